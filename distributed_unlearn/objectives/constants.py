"""What a round knows of every prediction before its first step: one float each, and never changed by a step.

Known from the scoring pass that opens the round, so no second model stays in memory; plain arrays, so that a round
that is taken up again goes on with the very same numbers.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]


def ragged_rows(num_tokens: Indices, at: Indices) -> Indices:
    """Rows of the records `at`, where record r has `num_tokens[r]` rows and all records' rows lie end to end."""
    starts, counts = np.cumsum(num_tokens) - num_tokens, num_tokens[at]
    # Row k of the r-th wanted record is starts[at[r]] + k: one repeat instead of a loop over records.
    shifts = starts[at] - (np.cumsum(counts) - counts)
    return np.repeat(shifts, counts) + np.arange(counts.sum())


def uniform_numbers(seed: int, indices: Indices, num_tokens: Indices) -> Floats:
    """One number in [0, 1) for every prediction, end to end: [N]; a function of seed, record and place in it alone.

    SplitMix64's finalizer (Steele, Lea, Flood 2014, figure 13) over the three, one after the other; the upper 53 bits.
    """
    state = _mixed(np.full(num_tokens.sum(), seed % 2**64, dtype=np.uint64))
    state = _mixed(state ^ np.repeat(indices, num_tokens).astype(np.uint64))
    places = ragged_rows(num_tokens, np.arange(len(num_tokens))) - np.repeat(
        np.cumsum(num_tokens) - num_tokens, num_tokens
    )
    state = _mixed(state ^ places.astype(np.uint64))
    return (state >> np.uint64(11)).astype(np.float64) / 2.0**53


def _mixed(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    state = state + np.uint64(0x9E3779B97F4A7C15)  # arrays of whole numbers wrap around
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def matched_targets(log_odds: Floats, sample: Floats) -> Floats:
    """Log-odds of the same rank in another set: `s*_i = sample sorted at floor((rank_i + 1/2) K / N)`.

    So the whole distribution is matched and not its mean: an unseen text has easy and hard tokens. Ranks are those of
    `log_odds`, from 0, ties in order of position; a sample of one value gives that value, of another length its
    quantiles.

    Args:
        log_odds: [N], of the predictions that are to be changed.
        sample: [K], K at least 1, of predictions that the model was never trained on; any order.

    Returns:
        [N].
    """
    assert len(sample) > 0, "no holdout predictions"
    ranks = np.empty(len(log_odds), dtype=np.int64)
    ranks[np.argsort(log_odds, kind="stable")] = np.arange(len(log_odds))
    # In whole numbers: a float product could round up to K.
    return np.sort(sample)[(2 * ranks + 1) * len(sample) // (2 * max(len(log_odds), 1))]


@dataclass(frozen=True, eq=False)
class RoundConstants:
    """R records, their N predictions end to end, each record's in the corpus's order."""

    indices: Indices
    """[R]: sorted, distinct."""
    num_tokens: Indices
    """[R]: predictions of each record."""
    start_nll: Floats
    """[N]: `-log p` of the label at the round's start, nats."""
    start_log_odds: Floats
    """[N]: its log-odds then."""
    target_log_odds: Floats
    """[N]: where its log-odds are to go; NaN for predictions without a target."""
    sample: Floats
    """[K]: log-odds of holdout predictions, from which targets are taken by rank; empty where they are not."""
    label_seed: int = 0
    """Of random labels; see `uniform_numbers`."""

    def __post_init__(self) -> None:
        lengths = [len(column) for column in (self.start_nll, self.start_log_odds, self.target_log_odds)]
        assert set(lengths) == {int(self.num_tokens.sum())} and len(self.indices) == len(self.num_tokens)

    @classmethod
    def none(cls) -> "RoundConstants":
        """For objectives that read none of a prediction."""
        indices, floats = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float64)
        return cls(indices, indices, floats, floats, floats, floats)

    def rows(self, wanted: Indices, num_tokens: Indices) -> tuple[Floats, Floats, Floats]:
        """`start_nll`, `start_log_odds` and `target_log_odds` of records end to end; NaN where nothing is known.

        Args:
            wanted: [W], records in any order.
            num_tokens: [W], predictions of each.
        """
        at = np.searchsorted(self.indices, wanted)
        known = np.zeros(len(wanted), dtype=np.bool_)
        inside = at < len(self.indices)
        known[inside] = self.indices[at[inside]] == wanted[inside]
        assert np.array_equal(self.num_tokens[at[known]], num_tokens[known]), "constants of another corpus"
        rows, filled = ragged_rows(self.num_tokens, at[known]), np.repeat(known, num_tokens)
        columns = []
        for column in (self.start_nll, self.start_log_odds, self.target_log_odds):
            found = np.full(len(filled), np.nan)
            found[filled] = column[rows]
            columns.append(found)
        return columns[0], columns[1], columns[2]


class LastSeen:
    """Targets by rank of every forget prediction's last seen log-odds (`order: refreshed`).

    Seen is what a gradient pass has come by; until then a prediction counts as it was at the round's start. The same
    on every rank, which all note the same; `values` is all there is to remember.
    """

    def __init__(self, constants: RoundConstants) -> None:
        self._constants, self.values = constants, constants.start_log_odds.copy()
        self._wanted = ~np.isnan(constants.target_log_odds)

    def note(self, indices: Indices, num_tokens: Indices, log_odds: Floats) -> None:
        """Log-odds of some records' predictions end to end; records without constants are passed over."""
        known = np.isin(indices, self._constants.indices)
        at = np.searchsorted(self._constants.indices, indices[known])
        assert np.array_equal(self._constants.num_tokens[at], num_tokens[known]), "predictions of another corpus"
        self.values[ragged_rows(self._constants.num_tokens, at)] = log_odds[np.repeat(known, num_tokens)]

    def constants(self) -> RoundConstants:
        """The round's constants with the targets of now."""
        known, target = self._constants, self._constants.target_log_odds.copy()
        target[self._wanted] = matched_targets(self.values[self._wanted], known.sample)
        return replace(known, target_log_odds=target)
