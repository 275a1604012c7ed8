"""What the race compares with: the retrained model's distributions on fixed records of one problem."""

from dataclasses import dataclass

import numpy as np
import torch

from distributed_unlearn.config import ModelConfig, ObjectiveConfig
from distributed_unlearn.curvature.linearisation import Linearisation
from distributed_unlearn.curvature.trace import LossShare
from distributed_unlearn.data.batches import Corpus
from distributed_unlearn.data.prepare import PreparedData
from distributed_unlearn.engine.communicator import RankSpec
from distributed_unlearn.engine.inputs import NotedLogits
from distributed_unlearn.engine.model import OpenedModel
from distributed_unlearn.engine.survey import jensen_shannon
from distributed_unlearn.engine.worker import Worker
from distributed_unlearn.evaluation.metrics import score_set, tug_of_war
from distributed_unlearn.records import SetScores

SETS = ("forget", "retain", "holdout")


class OneWorker:
    """A `WorkerGroup` of one whose worker can be looked into."""

    world_size = 1

    def __init__(self) -> None:
        self.worker = Worker(num_threads=1)
        port = self.worker.open_rendezvous("127.0.0.1", 600.0)
        self.worker.connect(RankSpec(0, 1, 0, 1), "127.0.0.1", port, 600.0, use_gpu=False)

    def call_all(self, method: str, *arguments: object) -> list[object]:
        """One answer."""
        return [getattr(self.worker, method)(*arguments)]

    def call_rank_zero(self, method: str, *arguments: object) -> object:
        """The same."""
        return getattr(self.worker, method)(*arguments)

    def share(self, value: object) -> object:
        """The value itself."""
        return value

    def shutdown(self) -> None:
        """Drop the model."""
        self.worker.close_model()


@dataclass(frozen=True)
class Problem:
    """Checkpoints and records of one seed."""

    name: str
    model: ModelConfig
    """That was trained on everything but the holdout."""
    data: PreparedData
    objective: ObjectiveConfig
    """Of the contestants that minimise the same."""
    retrained: str
    retrained_again: str | None
    """Retrained with another seed, for the noise floor; None: not trained."""
    seed: int
    micro_batch_size: int

    def at(self, path: str) -> ModelConfig:
        """Another checkpoint of the same model."""
        return self.model.model_copy(update={"path": path})

    def sets(self, most: int | None) -> dict[str, np.ndarray]:
        """The three sets; of larger ones the first `most` records, in the order of their numbers."""
        partition = self.data.partition
        found = {"forget": partition.forget_rounds[0], "retain": partition.retain(0), "holdout": partition.holdout}
        return {name: np.sort(indices)[:most] for name, indices in found.items()}


def distributions(opened: OpenedModel, corpus: Corpus, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-softmax [N, V] on all predictions of some records, and their labels [N]."""
    rows, labels = [], []
    for start in range(0, len(indices), 32):
        batch, noted = corpus.batch(indices[start : start + 32]), NotedLogits()
        Linearisation(opened.segmented, opened.store, [LossShare(batch.inputs, noted, batch.positions)]).loss()
        assert noted.logits is not None
        rows.append(torch.log_softmax(noted.logits.float(), -1))
        labels.append(batch.labels)
    return torch.cat(rows), torch.cat(labels)


def divergence(p: torch.Tensor, q: torch.Tensor) -> float:
    """Mean over rows of the Jensen-Shannon divergence of two log-distributions, nats."""
    return float(jensen_shannon(p, q).mean())


class Judge:
    """Compares models with the retrained one on fixed records."""

    def __init__(self, problem: Problem, most: int | None) -> None:
        self._problem, self._sets = problem, problem.sets(most)
        retrained, corpus = load(problem.at(problem.retrained)), problem.data.corpus
        self._reference = {name: distributions(retrained, corpus, i)[0] for name, i in self._sets.items()}

    def look(self, opened: OpenedModel) -> tuple[float, dict[str, float], dict[str, float], float]:
        """Tug-of-War, JS by set, memorised share by set, retain loss."""
        js: dict[str, float] = {}
        scores: dict[str, SetScores] = {}
        theirs: dict[str, SetScores] = {}
        for name, indices in self._sets.items():
            corpus = self._problem.data.corpus
            found, labels = distributions(opened, corpus, indices)
            reference = self._reference[name]
            js[name] = divergence(found, reference)
            counts = corpus.num_answer_tokens(indices)
            for rows, into in ((found, scores), (reference, theirs)):
                nll = -rows.gather(1, labels[:, None])[:, 0].double().numpy()
                hits = (rows.argmax(-1) == labels).numpy()
                starts = np.cumsum(counts) - counts
                sums = np.add.reduceat(nll, starts), counts, np.add.reduceat(hits.astype(np.int64), starts)
                into[name] = score_set(*sums)
        memorised = {name: score.exact_memorisation for name, score in scores.items()}
        return tug_of_war(scores, theirs), js, memorised, scores["retain"].loss_nats_per_token


def load(model: ModelConfig) -> OpenedModel:
    """A checkpoint, float32, in this process."""
    group = OneWorker()
    group.worker.open_model(model, "float32", 0)
    return group.worker.opened
