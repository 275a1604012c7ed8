"""How the cubic coefficient M changes after a trial: by fixed factors, or by what the trial says M should have been."""

import math
from dataclasses import dataclass
from typing import Literal

SMALLEST_COEFFICIENT, LARGEST_COEFFICIENT = 1e-8, 1e12

# M aims at twice the estimate, so that the model over-estimates the objective with room for noise. Aiming at the
# estimate itself after good steps met the stopping rule in fewer steps but ended farther from the retrained model.
_SAFETY = 2.0
_SMALLEST_INCREASE, _LARGEST_INCREASE = 2.0, 64.0  # per rejection; a rejection must shorten the step noticeably


@dataclass(frozen=True)
class Adaptation:
    """The rule, with its bounds.

    `factor` (Cartis, Gould, Toint 2011, algorithm 2.1): `M *= increase_factor` after a rejection,
    `M /= decrease_factor` after a very good step, else unchanged.

    `interpolated`: one trial measures the error of the quadratic model at one point,
    `e = f(w + y) - f(w) - g'y - 1/2 y'Hy`, and `M_est = 6 e / ||y||^3 = M + 6 (predicted - actual) / ||y||^3` is the
    coefficient whose cubic model would have met the objective there. After a rejection M becomes `2 M_est`, at least
    2 and at most 64 times M (`increase_factor` times where the trial was not finite). After an accepted step it
    becomes the geometric mean of M and `2 M_est`, which averages over minibatches, at least `M / decrease_factor` and
    at most `M * increase_factor`; so M also rises after a fair step, before anything is rejected. An error that the
    loss's rounding hides gives no estimate, and then the `factor` rule decides. The idea of using the trial's value
    is that of Gould, Porcelli, Toint 2012; safety, bounds and averaging are ours.
    """

    rule: Literal["factor", "interpolated"]
    increase_factor: float
    decrease_factor: float
    very_good_threshold: float

    def after_rejection(self, coefficient: float, estimate: float | None) -> float:
        """The larger coefficient with which the same step is tried again."""
        factor = self.increase_factor
        if self.rule == "interpolated" and estimate is not None:
            factor = min(max(_SAFETY * estimate / coefficient, _SMALLEST_INCREASE), _LARGEST_INCREASE)
        return min(coefficient * factor, LARGEST_COEFFICIENT)

    def after_giving_up(self, first: float, last: float) -> float:
        """The coefficient of the next step when no trial was good, from those of the first and the next trial.

        At most `increase_factor^2` times the first one: trials that fail at every M say little about M, and what a
        bad minibatch piled up would take many timid steps to come down again.
        """
        return min(last, first * self.increase_factor**2)

    def after_acceptance(self, coefficient: float, estimate: float | None, ratio: float) -> float:
        """The coefficient of the next step."""
        if self.rule == "factor" or estimate is None:
            factor = 1.0 / self.decrease_factor if ratio >= self.very_good_threshold else 1.0
        else:
            mean = math.sqrt(max(_SAFETY * estimate / coefficient, 0.0))
            factor = min(max(mean, 1.0 / self.decrease_factor), self.increase_factor)
        return min(max(coefficient * factor, SMALLEST_COEFFICIENT), LARGEST_COEFFICIENT)


def estimate_coefficient(
    coefficient: float, predicted: float, actual: float, update_norm: float, resolution: float
) -> float | None:
    """`M + 6 (predicted - actual) / ||y||^3`: the M whose cubic model meets the trial.

    None when the trial is not finite, or when `|predicted - actual|` is within `resolution`, the rounding of the loss.
    """
    error, cubed = predicted - actual, update_norm**3
    if not math.isfinite(error) or abs(error) <= resolution or cubed == 0.0:
        return None
    return coefficient + 6.0 * error / cubed
