"""A checkpoint of a few kilobytes, its records and a job that runs in seconds, for tests of whole commands."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from distributed_unlearn.demo.people import generate_people, write_people
from distributed_unlearn.demo.tokenizer import train_tokenizer

NUM_PEOPLE, RECORDS_EACH, CONTEXT = 6, 3, 128
FORGET, HOLDOUT = ("person-0000",), ("person-0004", "person-0005")


def first_order(method: str, learning_rate: float, max_steps: int = 1) -> str:
    """An override that replaces the whole solver section: a first-order method has none of the cubic step's keys."""
    stop = "stop: {forget_matches_holdout: false}"
    settings = f"method: {method}, learning_rate: {learning_rate!r}, gradient_batch: 6, max_steps: {max_steps}, {stop}"
    return f"solver={{{settings}}}"


@dataclass(frozen=True)
class TinyJob:
    """Paths of a model, records and a job; the job forgets `FORGET` in this process and has no output."""

    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def records(self) -> Path:
        return self.folder / "records.jsonl"

    @property
    def job(self) -> Path:
        return self.folder / "job.yaml"

    def run(self, output: Path, *overrides: str) -> list[str]:
        """Arguments of the command line."""
        return ["run", str(self.job), f"output={output}", *overrides]

    def rows(self) -> list[dict[str, str]]:
        return [json.loads(line) for line in self.records.read_text(encoding="utf-8").splitlines()]

    def copy_model(self, destination: Path) -> Path:
        """A copy that a test may spoil."""
        return Path(shutil.copytree(self.model, destination))


def make_tiny_job(folder: Path, num_people: int = NUM_PEOPLE) -> TinyJob:
    tiny = TinyJob(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_people(tiny.records, num_people, RECORDS_EACH, seed=0)
    people = generate_people(num_people, RECORDS_EACH, seed=0)
    # Byte pairs from questions alone, so that no file of the checkpoint holds a word of an answer.
    tokenizer = train_tokenizer([person["question"] for person in people], 320, CONTEXT)
    tokenizer.save_pretrained(tiny.model)
    save_model(tiny.model, torch.float32, len(tokenizer))
    tiny.job.write_text(yaml.safe_dump(_job(tiny)), encoding="utf-8")
    return tiny


def save_model(folder: Path, dtype: torch.dtype, vocab_size: int | None = None) -> None:
    """Write random weights beside the tokenizer in `folder`; the same weights in every dtype, up to rounding."""
    size = len(AutoTokenizer.from_pretrained(folder)) if vocab_size is None else vocab_size
    config = AutoConfig.for_model(
        "llama",
        vocab_size=size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(dtype).save_pretrained(folder)


def _job(tiny: TinyJob) -> dict[str, Any]:
    return {
        "model": {"path": str(tiny.model)},
        "data": {"path": str(tiny.records)},
        "forget": {"subjects": list(FORGET)},
        "holdout": {"subjects": list(HOLDOUT)},
        # Not the defaults, so that what is counted (products, Krylov steps) stays where defaults move.
        "objective": {"name": "holdout_matched"},
        "curvature": {"product": "hessian"},
        "solver": {
            "inner": "krylov",
            "metric": "identity",
            "cubic_coefficient": 100.0,
            "max_krylov_steps": 2,
            "gradient_batch": 6,
            "curvature_batch": 4,
            "max_steps": 2,
            "stop": {"forget_matches_holdout": False},
        },
        "cluster": {"backend": "in_process", "num_workers": 1, "zero_stage": 3, "use_gpu": "never"},
        "output": "-",
    }
