"""What the ranks compute for evaluations: surveys, continuations, probes and rounded weights."""

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distributed_unlearn.config import ModelConfig
from distributed_unlearn.data.encoding import EncodedCorpus
from distributed_unlearn.engine.worker import Worker
from distributed_unlearn.workers.survey import GreedySpec, ProbeSpec, TokenRows
from tests.engine.checkpoints import NUM_RECORDS
from tests.engine.ranks import Place, join_worker
from tests.families import VOCABULARY

RECORDS = np.arange(1, NUM_RECORDS)
FITTED, TRIED = np.arange(0, 8), np.arange(5, NUM_RECORDS)  # of random tokens only what was fitted can be read
NEW_TOKENS, STOP = 9, 17
BITS, GROUP = 4, 5
PROBE = ProbeSpec(FITTED, TRIED, np.arange(VOCABULARY), 0.05, 3)


@dataclass(frozen=True)
class EvaluationPlan:
    """Checkpoints, their corpus and prompts; which stages and families are tried."""

    folder: Path
    corpus: EncodedCorpus
    prompts: TokenRows
    stages: tuple[int, ...]
    families: tuple[str, ...]


def greedy(micro_batch_size: int) -> GreedySpec:
    return GreedySpec(NEW_TOKENS, (STOP,), 0, micro_batch_size)


def run_evaluation(place: Place, plan: EvaluationPlan) -> None:
    """Section by section into a file. All ranks must call this."""
    worker = join_worker(place)
    worker.set_corpus(plan.corpus)
    with place.file("sections").open("wb") as file:
        for stage in plan.stages:
            for section in _of_stage(worker, plan, stage):
                pickle.dump(section, file)
                file.flush()


def _of_stage(worker: Worker, plan: EvaluationPlan, stage: int) -> Any:
    def open_model(name: str) -> None:
        worker.open_model(ModelConfig(path=str(plan.folder / name)), "float32", stage)

    for name in plan.families:
        open_model(name)
        yield f"written {name} {stage}", worker.generate(plan.prompts, greedy(2))
    open_model("other_llama")
    worker.keep_reference()
    open_model("odd_llama")
    muddled = np.random.default_rng(0).permutation(RECORDS)
    yield f"survey {stage}", worker.survey(muddled, 3, True)
    worker.drop_reference()
    yield f"alone {stage}", worker.survey(muddled, 2, False)
    yield f"probe {stage}", worker.probe(PROBE)
    yield f"one prompt {stage}", worker.generate(TokenRows.of(plan.prompts.rows()[:1]), greedy(1))
    yield f"rounded {stage}", worker.quantise(BITS, GROUP)
    yield f"after rounding {stage}", worker.survey(RECORDS, 3, False)
