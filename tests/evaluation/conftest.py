"""A tiny checkpoint with its records, two references beside it, and wrong answers."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from distributed_unlearn.config import EvaluateConfig, parse_evaluation
from tests.tiny_job import FORGET, HOLDOUT, TinyJob, make_tiny_job


@dataclass(frozen=True)
class TinyEvaluation:
    """Paths, and an evaluation of them in this process."""

    tiny: TinyJob

    def path(self, name: str) -> Path:
        return self.tiny.folder / name

    def tree(self, output: Path, **sections: Any) -> dict[str, Any]:
        tree = {
            "model": {"path": str(self.tiny.model)},
            "data": {"path": str(self.tiny.records)},
            "forget": {"subjects": list(FORGET)},
            "holdout": {"subjects": list(HOLDOUT)},
            "cluster": {"backend": "in_process", "num_workers": 1, "zero_stage": 3, "use_gpu": "never"},
            "num_resamples": 100,
            "output": str(output),
        }
        return {name: value for name, value in (tree | sections).items() if value is not None}

    def config(self, output: Path, **sections: Any) -> EvaluateConfig:
        return parse_evaluation(self.tree(output, **sections), "test")


def _disturb(folder: Path, seed: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)


def _question(row: dict[str, str], with_id: bool) -> str:
    tree: dict[str, Any] = {"question": row["question"], "answer": row["answer"]}
    tree |= {"paraphrased_answer": f"It is {row['answer']}", "perturbed_answer": ["It is Bob", "It is not known"]}
    return json.dumps(tree | ({"record_id": row["record_id"]} if with_id else {})) + "\n"


@pytest.fixture(scope="session")
def evaluated(tmp_path_factory):
    tiny = make_tiny_job(tmp_path_factory.mktemp("evaluated"))
    for seed, name in ((1, "retrained"), (2, "again")):
        _disturb(tiny.copy_model(tiny.folder / name), seed)
    rows, found = tiny.rows(), TinyEvaluation(tiny)
    files = {
        "forget": [row for row in rows if row["subject_id"] in FORGET],
        "retain": [row for row in rows if row["subject_id"] not in (*FORGET, *HOLDOUT)][:4],
        "facts": rows[-3:],
    }
    for name, chosen in files.items():
        text = "".join(_question(row, with_id=name != "facts") for row in chosen)
        found.path(f"{name}.jsonl").write_text(text, encoding="utf-8")
    return found
