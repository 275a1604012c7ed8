"""What an evaluation asks of the workers beyond scores, and what it gets back. Numbers and tokens, never text."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from distributed_unlearn.objectives.constants import ragged_rows
from distributed_unlearn.workers.messages import Indices

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Survey:
    """R records, their N predictions end to end, each record's in the corpus's order; teacher-forced."""

    indices: Indices
    """[R]: records; distinct."""
    num_tokens: Indices
    """[R]: predictions of each."""
    nll: Floats
    """[N]: `-log p` of the label, nats."""
    hits: NDArray[np.bool_]
    """[N]: whether the arg max is the label."""
    rank: Indices
    """[N]: how many tokens have a larger logit than the label; 0 where it is the largest."""
    entropy: Floats
    """[N]: of the next-token distribution, nats."""
    variance: Floats
    """[N]: of `log p` under that distribution."""
    divergence: Floats
    """[N]: Jensen-Shannon divergence to the reference that the workers keep, nats; NaN where it was not asked for."""

    def __post_init__(self) -> None:
        assert len(self.indices) == len(self.num_tokens), "one count a record"
        lengths = {len(column) for column in self._columns()}
        assert lengths == {int(self.num_tokens.sum())}, "one row a prediction"

    def _columns(self) -> list[np.ndarray]:
        return [getattr(self, field.name) for field in fields(self)[2:]]

    @classmethod
    def joined(cls, parts: Sequence["Survey"]) -> "Survey":
        """Parts of different records as one, sorted by record."""
        assert parts, "no part"
        indices, num_tokens, *columns = (
            np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)
        )
        assert len(np.unique(indices)) == len(indices), "a record in two parts"
        order = np.argsort(indices, kind="stable")
        rows = ragged_rows(num_tokens, order)
        return cls(indices[order], num_tokens[order], *(column[rows] for column in columns))

    def of(self, wanted: Indices) -> "Survey":
        """Some of the records, in the order of `wanted`; this must be sorted by record."""
        at = np.searchsorted(self.indices, wanted)
        assert np.array_equal(self.indices[np.minimum(at, len(self.indices) - 1)], wanted), "records not surveyed"
        rows = ragged_rows(self.num_tokens, at)
        return Survey(self.indices[at], self.num_tokens[at], *(column[rows] for column in self._columns()))


@dataclass(frozen=True, eq=False)
class TokenRows:
    """Rows of tokens of any length, end to end: prompts, or what a model wrote after them."""

    tokens: NDArray[np.int32]
    lengths: Indices
    """[R]."""

    def __post_init__(self) -> None:
        assert len(self.tokens) == int(self.lengths.sum()), "tokens of other rows"

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]]) -> "TokenRows":
        """From lists of tokens."""
        flat = [token for row in rows for token in row]
        return cls(np.array(flat, dtype=np.int32), np.array([len(row) for row in rows], dtype=np.int64))

    def rows(self) -> list[list[int]]:
        """As lists of tokens."""
        return [part.tolist() for part in np.split(self.tokens, np.cumsum(self.lengths)[:-1])]


@dataclass(frozen=True)
class GreedySpec:
    """How continuations are written: the most likely token every time."""

    max_new_tokens: int
    stop_tokens: tuple[int, ...]
    """A row ends with any of them, which is its last token."""
    pad_token: int
    micro_batch_size: int


@dataclass(frozen=True, eq=False)
class ProbeSpec:
    """A linear probe of every block's output: fitted on some predictions, tried on others."""

    fitted_on: Indices
    """Records that the model should know."""
    tried_on: Indices
    """Records of which is asked whether their answers can be read."""
    classes: Indices
    """[K], sorted: the tokens that the probe chooses from."""
    ridge: float
    """Weight of the penalty, a share of the mean variance of a hidden unit."""
    micro_batch_size: int


@dataclass(frozen=True, eq=False)
class ProbeHits:
    """Where the probe was right."""

    indices: Indices
    """[R], sorted: the records that it was tried on."""
    num_tokens: Indices
    """[R]."""
    hits: NDArray[np.bool_]
    """[B, N]: by block, then by prediction; false where the label is none of the classes."""
