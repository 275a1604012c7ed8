"""Judges a round by measurements: its forget sets against unseen records, its retain set against the job's start.

A forget set is *forgotten* when nothing shows that its records are easier for the model than the holdout's. Two
measures of every record are compared, its mean loss and the share of its answer that is memorised, since a few very
unlikely tokens can carry a mean loss while the rest is still recited. For each there are two tests:
- *location*, the Mann-Whitney U test (Mann and Whitney 1947; normal approximation with ties and continuity): are the
  forget records easier on the whole?
- *precedence* (Nelson 1963; exact): are more of them than chance has it easier than the easiest twentieth of the
  holdout? Half of a set still recited and half driven far beyond would pass any comparison of means.
A test speaks against forgetting when it rejects at 5 % over all four (Bonferroni) and the difference also matters
(`share_easier` at least 0.55; at least twice as many known records as chance has). Tests of a few records have no
power: three quarters of the way from known to unseen must be gone besides, wherever there was a way to go (means apart
by more than a tolerance and two standard errors).

Each holdout record counts as hard as it is at the job's start or now, whichever is easier: damaged weights make every
record hard, and a model that got better at all of them knows none.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from distributed_unlearn.records.verdict import Forgetting, ForgetVerdict, MeasureEvidence, RetainVerdict, Verdict
from distributed_unlearn.rounds.evaluate import Scores

SIGNIFICANCE, NUM_TESTS = 0.05, 4
"""Chance to call a set known that cannot be told from unseen records, over all four tests."""
RELEVANT_SHARE = 0.55
"""P(easier) from which on a difference matters, however many records show it."""
EASIEST_SHARE = 0.05
"""A record counts as known when it is easier than this share of the holdout."""
FORGOTTEN_GAP_CLOSED, PARTLY_GAP_CLOSED = 0.75, 0.25
"""Shares of the way from known to unseen from which on a set may count as forgotten, and as partly forgotten."""
LOSS_TOLERANCE_NATS, MISSED_TOLERANCE = 0.15, 0.05
"""Distances of means, nats per token and share of tokens, below which there is no way to go."""
DAMAGE_LOSS_NATS, DAMAGE_MEMORISED = 0.25, 0.05
"""Rise of the retain set's loss and drop of its memorised share from which on it counts as damaged."""


@dataclass(frozen=True, eq=False)
class RecordScores:
    """How hard each record of a set is for a model, in one order."""

    losses: np.ndarray
    """float64 [n], mean loss of the answer, nats per token."""
    missed: np.ndarray
    """float64 [n], share of the answer's tokens whose argmax is not the label: 1 - memorised."""


def judge(sets: Mapping[str, np.ndarray], start: Scores, now: Scores) -> Verdict:
    """How all sets of a round stand.

    Args:
        sets: Records by set: `forget`, `retain`, `holdout`, `forget_round_<k>`, `erased_before_<k>`; some may be empty.
        start: All of them at the start of the job.
        now: All of them under the current weights.
    """
    retain = judge_retention(_of(now, sets["retain"]), _of(start, sets["retain"]))
    if not len(sets["holdout"]):
        return Verdict(None, retain)
    first, last = _of(start, sets["holdout"]), _of(now, sets["holdout"])
    holdout = RecordScores(np.minimum(first.losses, last.losses), np.minimum(first.missed, last.missed))
    found = []
    for name, indices in sets.items():
        if len(indices) and name.startswith(("forget", "erased_before")):
            known = None if name.startswith("erased_before") else _of(start, indices)
            found.append(judge_forgetting(name, _of(now, indices), holdout, known))
    return Verdict(found[0], retain, tuple(found[1:]))


def _of(scores: Scores, indices: np.ndarray) -> RecordScores:
    part = scores.of(np.unique(indices))
    return RecordScores(part.mean_losses, part.missed)


def judge_forgetting(
    set_name: str, now: RecordScores, holdout: RecordScores, start: RecordScores | None
) -> ForgetVerdict:
    """Whether a set that was to be forgotten can still be told from records that were never trained on.

    Args:
        set_name: As in the round's scores.
        now: The set under the current weights.
        holdout: Never trained on; see the module.
        start: The set at the start of the job, as known as it was; None: taken for fully known, 0 by both measures.

    Returns:
        *forgotten* as the module says, but *nothing to forget* where the set was so at the start, with no way to go by
        either measure; else *partly forgotten* where a quarter of the way from known to unseen is gone
        by both measures; else *not forgotten*.
    """
    loss = _evidence(now.losses, holdout.losses, None if start is None else start.losses, LOSS_TOLERANCE_NATS)
    missed = _evidence(now.missed, holdout.missed, None if start is None else start.missed, MISSED_TOLERANCE)
    num_records, num_holdout = len(now.losses), len(holdout.losses)
    closed = [part.gap_closed for part in (loss, missed) if part.gap_closed is not None]
    outcome: Forgetting = "forgotten"
    told_apart = any(_is_told_apart(part, num_records, num_holdout) for part in (loss, missed))
    if told_apart or min(closed, default=1.0) < FORGOTTEN_GAP_CLOSED:
        outcome = "partly forgotten" if min(closed, default=0.0) >= PARTLY_GAP_CLOSED else "not forgotten"
    elif start is not None and not closed and not _is_known(start, holdout):
        outcome = "nothing to forget"
    harder = any(
        share >= RELEVANT_SHARE and p <= SIGNIFICANCE / NUM_TESTS
        for share, p in (_location(holdout.losses, now.losses), _location(holdout.missed, now.missed))
    )
    return ForgetVerdict(set_name, outcome, num_records, num_holdout, harder, loss, missed)


def _is_known(start: RecordScores, holdout: RecordScores) -> bool:
    """Whether any of the tests tells a set from the holdout."""
    parts = (
        _evidence(start.losses, holdout.losses, None, LOSS_TOLERANCE_NATS),
        _evidence(start.missed, holdout.missed, None, MISSED_TOLERANCE),
    )
    return any(_is_told_apart(part, len(start.losses), len(holdout.losses)) for part in parts)


def judge_retention(now: RecordScores, start: RecordScores) -> RetainVerdict:
    """Whether the retain set is as it was at the start of the job; both hold the same records in the same order.

    *damaged* when the mean rise of the loss or the mean drop of the memorised share is above its limit and above 1.645
    of its standard errors (paired differences, one-sided 5 %).
    """
    rise, drop = now.losses - start.losses, now.missed - start.missed
    damaged = _rises(rise, DAMAGE_LOSS_NATS) or _rises(drop, DAMAGE_MEMORISED)
    return RetainVerdict("damaged" if damaged else "kept", len(rise), float(rise.mean()), float(drop.mean()))


def _rises(differences: np.ndarray, limit: float) -> bool:
    return not float(differences.mean()) <= max(limit, 1.645 * _error_of_mean(differences))  # NaN is damage


def _error_of_mean(values: np.ndarray) -> float:
    """Standard error of the mean; 0 of a single value, which has none."""
    return float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def _is_told_apart(part: MeasureEvidence, num_records: int, num_holdout: int) -> bool:
    level = SIGNIFICANCE / NUM_TESTS
    easier = part.p_easier <= level and part.share_easier >= RELEVANT_SHARE
    chance = _easiest_rank(num_holdout) / (num_holdout + 1)
    return easier or (part.p_known <= level and part.num_known >= 2 * chance * num_records)


def _evidence(now: np.ndarray, holdout: np.ndarray, start: np.ndarray | None, tolerance: float) -> MeasureEvidence:
    share, p_easier = _location(now, holdout)
    num_known, p_known = _precedence(now, holdout)
    unseen, known = float(holdout.mean()), 0.0 if start is None else float(start.mean())
    gap = unseen - known
    noise = 2.0 * math.hypot(_error_of_mean(holdout), 0.0 if start is None else _error_of_mean(start))
    closed = (float(now.mean()) - known) / gap if gap > max(tolerance, noise) else None
    start_mean = None if start is None else known
    return MeasureEvidence(float(now.mean()), unseen, start_mean, closed, share, p_easier, num_known, p_known)


def _location(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """P(first < second) + P(first = second) / 2, and the one-sided p-value of Mann-Whitney's U that it is above 1/2."""
    n, m = len(first), len(second)
    ordered = np.sort(second)
    below = np.searchsorted(ordered, first, side="left")
    not_above = np.searchsorted(ordered, first, side="right")
    share = 1.0 - float((below + not_above).mean()) / (2 * m)
    _, ties = np.unique(np.concatenate([first, second]), return_counts=True)
    total = n + m
    correction = float((ties.astype(np.float64) ** 3 - ties).sum()) / (total * (total - 1))
    variance = (total + 1 - correction) / (12 * n * m)  # of the share, under equality
    if variance <= 0.0:
        return share, 1.0
    z = (share - 0.5 - 0.5 / (n * m)) / math.sqrt(variance)
    return share, 0.5 * math.erfc(z / math.sqrt(2))


def _easiest_rank(num_holdout: int) -> int:
    return max(1, int(EASIEST_SHARE * (num_holdout + 1)))


def _precedence(now: np.ndarray, holdout: np.ndarray) -> tuple[int, float]:
    """How many records are easier than the r-th easiest of the holdout, and the exact chance of so many.

    If all orders of the n + m values are alike, `P(K = k) = C(k + r - 1, k) C(n + m - k - r, n - k) / C(n + m, n)`.
    """
    n, m = len(now), len(holdout)
    r = _easiest_rank(m)
    num_known = int((now < np.sort(holdout)[r - 1]).sum())
    whole = _log_choose(n + m, n)
    logs = (_log_choose(k + r - 1, k) + _log_choose(n + m - k - r, n - k) - whole for k in range(num_known, n + 1))
    return num_known, min(1.0, math.fsum(math.exp(value) for value in logs))


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
