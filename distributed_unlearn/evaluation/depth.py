"""Depth: can the forgotten answers still be read from inside the model by a linear probe?

The probe of every block is fitted on one half of the retain set and tried on the other half, on the forget set and on
the holdout set. The other half shows what known answers look like, the holdout set what unseen ones do; the forget set
lies between. The block is shown where the forget set reads best.
"""

import numpy as np

from distributed_unlearn.config import DepthConfig
from distributed_unlearn.evaluation.bench import Bench
from distributed_unlearn.evaluation.gather import Subject
from distributed_unlearn.evaluation.metrics import catalogue
from distributed_unlearn.evaluation.metrics.per_record import Floats, means
from distributed_unlearn.records.evaluation import MetricRow
from distributed_unlearn.workers.survey import ProbeHits, ProbeSpec

_MOST_FITTED = 2000
"""Records that a probe is fitted on, at most."""


class Depth:
    """Linear probes of all blocks."""

    def __init__(self, bench: Bench, settings: DepthConfig) -> None:
        self._bench = bench
        retain = np.random.default_rng(0).permutation(bench.sets["retain"])
        half = max(1, min(len(retain) // 2, _MOST_FITTED))
        fitted, rest = np.sort(retain[:half]), np.sort(retain[half : 2 * half])
        self._sets = {"forget": bench.sets["forget"], "retain": rest, "holdout": bench.sets["holdout"]}
        tried = np.unique(np.concatenate(list(self._sets.values())))
        labels = [bench.corpus.batch(fitted[start : start + 256]).labels for start in range(0, len(fitted), 256)]
        classes = np.unique(np.concatenate([part.numpy() for part in labels]))
        self._spec = ProbeSpec(fitted, tried, classes, settings.ridge, bench.config.micro_batch_size)
        self._hits: dict[str, ProbeHits] = {}

    def gather(self, subject: Subject) -> None:
        """Fit and try."""
        self._hits[subject.role] = self._bench.gatherer.probe(subject, self._bench.corpus, self._spec)

    def rows(self) -> list[MetricRow]:
        """The share that the probe of the best block reads, by set."""
        best = {role: int(self._shares(role)["forget"].mean(axis=1).argmax()) for role in self._hits}
        blocks = f"block {best['model'] + 1} of {len(self._hits['model'].hits)}"
        note = f"{blocks}; of retain records that the probe was not fitted on"
        return [
            self._bench.rows.of_means(
                catalogue.DEPTH, name, {role: self._shares(role)[name][best[role]] for role in self._hits}, note=note
            )
            for name, indices in self._sets.items()
            if len(indices)
        ]

    def by_block(self) -> dict[str, tuple[float, ...]]:
        """Of the model, by set: the mean share of every block."""
        return {name: tuple(float(x) for x in shares.mean(axis=1)) for name, shares in self._shares("model").items()}

    def _shares(self, role: str) -> dict[str, Floats]:
        """By set: [blocks, records], the share of each record's answer that is read."""
        found = self._hits[role]
        shares = np.stack([means(hits, found.num_tokens) for hits in found.hits])
        return {
            name: shares[:, np.searchsorted(found.indices, indices)]
            for name, indices in self._sets.items()
            if len(indices)
        }
