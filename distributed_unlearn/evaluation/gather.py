"""Evidence of models on sets of records, each record scored once and every number kept by content."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields

import numpy as np

from distributed_unlearn.config import ModelConfig, QuantiseConfig, RelearnConfig, TrainConfig
from distributed_unlearn.data.batches import NamedCorpus
from distributed_unlearn.evaluation.cache import EvidenceCache, content_key, corpus_hash
from distributed_unlearn.evaluation.watch import Watch
from distributed_unlearn.workers.client import Workers
from distributed_unlearn.workers.messages import TrainingSpec
from distributed_unlearn.workers.survey import GreedySpec, ProbeHits, ProbeSpec, Survey, TokenRows

_MICRO_BATCHES_PER_CALL = 32
"""Of one call, a rank: bounds its time, which is limited, and shows progress."""
_PROMPTS_PER_CALL = 4
"""Micro-batches of prompts of one call, a rank: each takes as many forward passes as tokens are written."""


@dataclass(frozen=True)
class Subject:
    """A checkpoint that is measured."""

    role: str
    """`model`, `retrained` or `retrained_again`."""
    config: ModelConfig
    sha256: str
    """Over its files."""


@dataclass(frozen=True, eq=False)
class Condition:
    """What is done to a model before it is measured."""

    quantise: QuantiseConfig | None = None
    relearn: RelearnConfig | None = None
    relearned: np.ndarray | None = None
    """Records that are learned again."""

    @property
    def words(self) -> str:
        """For people; empty where nothing is done."""
        if self.quantise is not None:
            return f" after rounding to {self.quantise.bits} bits"
        if self.relearned is not None:
            return f" after learning {len(self.relearned)} forget record(s) again"
        return ""

    def key(self, corpus: NamedCorpus) -> object:
        """As JSON, for a cache's key."""
        if self.quantise is not None:
            return {"quantise": self.quantise.model_dump(mode="json")}
        if self.relearn is not None:
            assert self.relearned is not None
            return {"relearn": self.relearn.model_dump(mode="json"), "records": corpus_hash(corpus, self.relearned)}
        return None


AS_IT_IS = Condition()


class Gatherer:
    """Opens models as they are needed and asks the workers for what the cache does not have."""

    def __init__(
        self, workers: Workers, cache: EvidenceCache, zero_stage: int, micro_batch_size: int, watch: Watch
    ) -> None:
        self._workers, self._cache, self._watch = workers, cache, watch
        self._stage, self._micro = zero_stage, micro_batch_size
        self._opened: object = None
        self._kept: str | None = None
        self._corpus: NamedCorpus | None = None

    @property
    def num_cached(self) -> int:
        """Parts that were taken from the cache."""
        return self._cache.num_hits

    def end(self) -> None:
        """Have the workers forget the reference; they may go on with something else."""
        if self._kept is not None:
            self._workers.drop_reference()
            self._kept = None

    def survey(
        self,
        subject: Subject,
        corpus: NamedCorpus,
        indices: np.ndarray,
        what: str,
        against: Subject | None = None,
        condition: Condition = AS_IT_IS,
    ) -> Survey:
        """What every prediction of some records (sorted) is like; with `against`, how far from that model's."""
        parts = {
            **self._of_model(subject, condition, corpus),
            "against": None if against is None else against.sha256,
            "records": corpus_hash(corpus, indices),
        }

        def ask() -> dict[str, np.ndarray]:
            if against is not None:
                self._keep(against)
            self._open(subject, corpus, condition)
            size = _MICRO_BATCHES_PER_CALL * self._micro * self._workers.world_size
            found = Survey.joined(
                [
                    self._workers.survey(chosen, self._micro, against is not None)
                    for chosen in self._pieces(indices, size, f"{what} ({subject.role})")
                ]
            )
            return {field.name: getattr(found, field.name) for field in fields(found) if field.name != "indices"}

        return Survey(indices, **self._cached("survey", parts, ask))

    def continued(
        self,
        subject: Subject,
        prompts: TokenRows,
        spec: GreedySpec,
        settings: Mapping[str, object],
        score: Callable[[TokenRows], dict[str, np.ndarray]],
        what: str,
    ) -> dict[str, np.ndarray]:
        """Scores of greedy continuations; what was written is scored at once and kept nowhere.

        Args:
            subject: Who writes.
            prompts: After which.
            spec: How.
            settings: What `score` depends on, for the cache.
            score: Continuations -> arrays by name.
            what: For progress.
        """
        parts = {
            **self._of_model(subject, AS_IT_IS, None),
            "prompts": [prompts.tokens.tolist(), prompts.lengths.tolist()],
            "greedy": [spec.max_new_tokens, list(spec.stop_tokens)],
            "settings": dict(settings),
        }

        def ask() -> dict[str, np.ndarray]:
            self._open(subject, None, AS_IT_IS)
            rows, written = prompts.rows(), []
            size = _PROMPTS_PER_CALL * spec.micro_batch_size * self._workers.world_size
            for chosen in self._pieces(np.arange(len(rows)), size, f"{what} ({subject.role})"):
                written += self._workers.generate(TokenRows.of([rows[i] for i in chosen]), spec).rows()
            return score(TokenRows.of(written))

        return self._cached("continued", parts, ask)

    def probe(self, subject: Subject, corpus: NamedCorpus, spec: ProbeSpec) -> ProbeHits:
        """Where linear probes of the model's hidden states are right."""
        parts = {
            **self._of_model(subject, AS_IT_IS, None),
            "fitted_on": corpus_hash(corpus, spec.fitted_on),
            "tried_on": corpus_hash(corpus, spec.tried_on),
            "classes": spec.classes.tolist(),
            "ridge": spec.ridge,
        }

        def ask() -> dict[str, np.ndarray]:
            self._open(subject, corpus, AS_IT_IS)
            self._watch.progress(f"linear probes ({subject.role})", 0, 1)
            found = self._workers.probe(spec)
            self._watch.progress(f"linear probes ({subject.role})", 1, 1)
            return {"num_tokens": found.num_tokens, "hits": found.hits}

        return ProbeHits(spec.tried_on, **self._cached("probe", parts, ask))

    def _cached(
        self, kind: str, parts: Mapping[str, object], ask: Callable[[], dict[str, np.ndarray]]
    ) -> dict[str, np.ndarray]:
        key = content_key(kind, parts)
        found = self._cache.read(key)
        if found is None:
            found = ask()
            self._cache.write(key, found)
        return found

    def _of_model(self, subject: Subject, condition: Condition, corpus: NamedCorpus | None) -> dict[str, object]:
        key = None if corpus is None else condition.key(corpus)
        return {"model": subject.sha256, "dtype": subject.config.dtype, "condition": key}

    def _pieces(self, indices: np.ndarray, size: int, what: str) -> Iterator[np.ndarray]:
        """Pieces of bounded work; the watch is told how many records are done whenever the next one is taken."""
        for start in range(0, len(indices), size):
            self._watch.progress(what, start, len(indices))
            yield indices[start : start + size]
        self._watch.progress(what, len(indices), len(indices))

    def _keep(self, subject: Subject) -> None:
        """Have the workers keep a model to compare with."""
        if self._kept != subject.sha256:
            self._open(subject, None, AS_IT_IS)
            self._workers.keep_reference()
            self._kept = subject.sha256

    def _open(self, subject: Subject, corpus: NamedCorpus | None, condition: Condition) -> None:
        if corpus is not None and corpus is not self._corpus:
            self._workers.set_corpus(corpus)
            self._corpus = corpus
        wanted = (subject.sha256, condition)
        if self._opened == wanted:
            return
        self._opened = None
        if condition.relearn is not None:
            self._relearn(subject, condition.relearn, condition)
        else:
            self._workers.open_model(subject.config, subject.config.dtype, self._stage)
        if condition.quantise is not None:
            self._workers.quantise(condition.quantise.bits, condition.quantise.group_size)
        self._opened = wanted

    def _relearn(self, subject: Subject, settings: RelearnConfig, condition: Condition) -> None:
        """Train a little on the condition's records; the trained model is open afterwards."""
        assert condition.relearned is not None and self._corpus is not None
        train = TrainConfig(
            epochs=settings.epochs,
            batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            weight_decay=0.0,
            warmup_share=0.0,
        )
        spec = TrainingSpec(subject.config, train, condition.relearned, self._stage, self._micro, 0)
        plan = self._workers.begin_training(spec)
        for step in range(plan.num_steps):
            self._watch.progress(f"learning some records again ({subject.role})", step, plan.num_steps)
            self._workers.train_step(step)
        self._watch.progress(f"learning some records again ({subject.role})", plan.num_steps, plan.num_steps)
        self._workers.finish_training()
