"""How the cubic coefficient M changes after a trial: by fixed factors, or by what the trial says M should have been."""

import math
from dataclasses import dataclass
from typing import Literal

SMALLEST_COEFFICIENT, LARGEST_COEFFICIENT = 1e-8, 1e12

# M aims at twice the estimate, so that the model over-estimates the objective with room for noise. Aiming at the
# estimate itself after good steps met the stopping rule in fewer steps but ended farther from the retrained model.
_SAFETY = 2.0
_SMALLEST_INCREASE, _LARGEST_INCREASE = 2.0, 64.0  # per rejection; a rejection must shorten the step noticeably
_FIRST_MOVE = 64.0  # at most, up or down, at the first accepted trial


@dataclass(frozen=True)
class Adaptation:
    """The rule, with its bounds.

    `factor` (Cartis, Gould, Toint 2011, algorithm 2.1): `M *= increase_factor` after a rejection,
    `M /= decrease_factor` after a very good step, else unchanged.

    `interpolated`: one trial measures the error of the quadratic model at one point,
    `e = f(w + y) - f(w) - g'y - 1/2 y'Hy`, and `M_est = 6 |e| / ||y||^3` is the smallest M that bounds it: M stands for
    the Lipschitz constant of the Hessian, `|e| <= (M/6) ||y||^3` (Nesterov and Polyak 2006, lemma 1). The sign does not
    matter: with a negative error the quadratic model was as wrong. After an accepted step M becomes the geometric mean
    of M and `2 M_est`, which averages over minibatches, at least `M / decrease_factor` and at most
    `M * increase_factor`; so M also rises after a fair step, before anything is rejected. Nothing is known of M before
    the first accepted trial, so there it becomes `2 M_est` itself, within a factor of 64. An error that the loss's
    rounding hides gives no estimate, and then the `factor` rule decides.

    Which f? M bounds the change of the Hessian, so f, g and H must be of one minibatch. Where the curvature minibatch
    C is a part of the gradient minibatch B, the trial's own error, `e_B = M_B/6 ||y||^3 + 1/2 y'(H_B - H_C)y`, holds
    the difference of the two Hessians, which shrinks like `||y||^2`, not `||y||^3`: in short steps it is all that is
    seen. So accepted steps use `e_C`, measured on C alone (`Trial.remainder`). A rejection is another matter: the next
    trial must pass the test on B with H_C, and only a larger M can make it, whatever the cause. There M becomes
    `2 M_est` with the trial's own error, `M_est = M + 6 (predicted - actual) / ||y||^3`, at least 2 and at most 64
    times M (`increase_factor` times where the trial was not finite); the next accepted steps bring it down again.

    The idea of using the trial's value is that of Gould, Porcelli, Toint 2012; the rest is ours.
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

    def after_first_trial(self, coefficient: float, estimate: float | None, ratio: float) -> float:
        """The coefficient after the first accepted trial, which replaces the guess that the round began with."""
        if estimate is None:
            return self.after_acceptance(coefficient, None, ratio)
        factor = min(max(_SAFETY * estimate / coefficient, 1.0 / _FIRST_MOVE), _FIRST_MOVE)
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


def model_error(remainder: float, curvature: float, update_norm: float, resolution: float) -> float | None:
    """`6 |r - 1/2 y'Hy| / ||y||^3` with `r = f(w + y) - f(w) - g'y`, all of one minibatch: the M that its error shows.

    None when it is not finite, or when the error is within `resolution`, the rounding of the loss.
    """
    error, cubed = remainder - 0.5 * curvature, update_norm**3
    if not math.isfinite(error) or abs(error) <= resolution or cubed == 0.0:
        return None
    return 6.0 * abs(error) / cubed
