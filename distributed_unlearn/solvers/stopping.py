"""When a round may end early, without a retrained model to compare with."""

import math

import numpy as np
from numpy.typing import NDArray

NEGLIGIBLE_DISTANCE = 0.05
"""A distance between distributions that stops a round whatever the test says: with very many tokens a test at any level
rejects differences that mean nothing."""


def two_sample_distance(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """`sup_x |F_1(x) - F_2(x)|` of two samples' distributions (Kolmogorov, Smirnov), in [0, 1]; NaN for NaN."""
    if np.isnan(first).any() or np.isnan(second).any():
        return float("nan")
    first, second = np.sort(first), np.sort(second)
    both = np.concatenate([first, second])
    shares = [np.searchsorted(sample, both, side="right") / len(sample) for sample in (first, second)]
    return float(np.abs(shares[0] - shares[1]).max())


def critical_distance(num_first: int, num_second: int, level: float) -> float:
    """The distance up to which a two-sample test does not tell two samples apart.

    `sqrt(-log(level / 2) / 2) sqrt((n + m) / (n m))`, the large-sample limit of the two-sided Kolmogorov-Smirnov test
    (Smirnov 1948), which errs on the side of going on: for small samples the true one is larger.
    """
    return math.sqrt(-math.log(level / 2) / 2 * (num_first + num_second) / (num_first * num_second))


class StoppingRule:
    """Stops once the forget set is as hard as data never trained on, and the retain loss is back where it was.

    A retrained model has never seen the forget set and finds it as hard as held-out data; a distance of zero between
    the two is the target that a round can measure by itself. State: the number of consecutive updates for which both
    conditions held.
    """

    def __init__(
        self,
        holdout_loss: float | None,
        initial_retain_loss: float,
        forget_tolerance: float,
        retain_tolerance: float,
        patience: int,
        max_seconds: float | None,
    ) -> None:
        """All losses and tolerances in nats per token; `holdout_loss` None disables the loss conditions.

        Raises:
            ValueError: a tolerance or `max_seconds` that is not positive, or `patience` below 1.
        """
        if not (forget_tolerance > 0.0 and retain_tolerance > 0.0 and patience >= 1):
            raise ValueError(
                f"got tolerances {forget_tolerance}, {retain_tolerance} and patience {patience}; "
                "expected positive tolerances and patience of at least 1"
            )
        if max_seconds is not None and not max_seconds > 0.0:
            raise ValueError(f"got max_seconds {max_seconds}; expected a positive number or None")
        self._holdout_loss = holdout_loss
        self._retain_limit = initial_retain_loss + retain_tolerance
        self.forget_tolerance = forget_tolerance
        """Distances up to this one match."""
        self._patience = patience
        self._max_seconds = max_seconds
        self._num_consecutive = 0

    def update(
        self, step: int, forget_loss_distance: float | None, retain_loss: float, elapsed_seconds: float
    ) -> str | None:
        """A short sentence that says why to stop after this step, or None to go on.

        Args:
            step: index of the step just taken, from 0; the sentence counts from 1.
            forget_loss_distance: mean over forget records of |record's mean answer loss - holdout loss|, nats per
                token; None when it was not measured, which counts as not matching.
            retain_loss: on a fixed sample of the retain set, nats per token. NaN in either loss never stops.
            elapsed_seconds: since the round began.
        """
        if self._holdout_loss is not None:
            matches = forget_loss_distance is not None and forget_loss_distance <= self.forget_tolerance
            self._num_consecutive = self._num_consecutive + 1 if matches and retain_loss <= self._retain_limit else 0
            if forget_loss_distance is not None and self._num_consecutive >= self._patience:
                return (
                    f"after step {step + 1} {self._matched(forget_loss_distance)} and the retain loss "
                    f"{retain_loss:.3f} is at most {self._retain_limit:.3f}, "
                    f"for {self._num_consecutive} consecutive steps"
                )
        return self.timeout(step, elapsed_seconds)

    def _matched(self, distance: float) -> str:
        return f"the forget loss is within {distance:.3f} nats per token of the holdout loss {self._holdout_loss:.3f}"

    @property
    def num_consecutive(self) -> int:
        """Updates in a row, up to the last, for which both conditions held."""
        return self._num_consecutive

    def go_on_from(self, num_consecutive: int) -> None:
        """Count on from what another rule of the same round had counted."""
        self._num_consecutive = num_consecutive

    def timeout(self, step: int, elapsed_seconds: float) -> str | None:
        """The part of the rule that needs no loss: `max_seconds`, or None to go on."""
        if self._max_seconds is not None and elapsed_seconds >= self._max_seconds:
            seconds = f"{elapsed_seconds:.1f} s of {self._max_seconds:.1f} s"
            return f"max_seconds: {seconds} were used up after step {step + 1}"
        return None


class TwoSampleRule(StoppingRule):
    """As `StoppingRule`, with whole distributions: stops once a test cannot tell forget from holdout predictions.

    The distance is that of the forget predictions' log-odds to the holdout predictions', and what it is compared with
    is the critical distance of a two-sample test at the level, or `NEGLIGIBLE_DISTANCE` if that is larger. Tokens of
    one record are not independent; the test takes them as if they were, so it stops later rather than sooner.
    """

    def __init__(
        self,
        holdout_log_odds: NDArray[np.float64],
        num_forget_predictions: int,
        level: float,
        initial_retain_loss: float,
        retain_tolerance: float,
        patience: int,
        max_seconds: float | None,
    ) -> None:
        """Losses in nats per token, see `StoppingRule`.

        Raises:
            ValueError: a level outside (0, 1), no predictions, or what `StoppingRule` refuses.
        """
        if not (0.0 < level < 1.0 and len(holdout_log_odds) and num_forget_predictions):
            raise ValueError(
                f"got level {level}, {len(holdout_log_odds)} holdout and {num_forget_predictions} forget predictions; "
                "expected a level between 0 and 1 and at least one of each"
            )
        self._holdout_log_odds, self._level = np.sort(holdout_log_odds), level
        critical = critical_distance(num_forget_predictions, len(holdout_log_odds), level)
        tolerance = max(critical, NEGLIGIBLE_DISTANCE)
        # The loss only says whether the conditions are in force.
        super().__init__(0.0, initial_retain_loss, tolerance, retain_tolerance, patience, max_seconds)

    def distance(self, forget_log_odds: NDArray[np.float64]) -> float:
        """How far the forget predictions are from the holdout's, for `update`."""
        return two_sample_distance(forget_log_odds, self._holdout_log_odds)

    def _matched(self, distance: float) -> str:
        return (
            f"the forget tokens' log-odds are distributed as the holdout's (distance {distance:.3f}, at most "
            f"{self.forget_tolerance:.3f} at level {self._level:g})"
        )
