"""Parts of objectives that look at single predictions: where the log-odds of each label are to be.

Today's alternatives pull means: a mean loss can be met while most tokens are still predicted, and its derivative
vanishes as `1 - p` where the model has memorised. Log-odds `s` are nearly linear in the logits, so a squared distance
is nearly quadratic, Gauss-Newton's model of it is nearly exact, and no token is too certain to be moved.
"""

from dataclasses import dataclass

from torch import Tensor

from distributed_unlearn.objectives.predictions import MinibatchTotals, Predictions
from distributed_unlearn.objectives.terms import Needs, huber


@dataclass(frozen=True)
class MatchedLogOddsTerm:
    """Forget tokens' log-odds are brought to targets of their own.

    `mean over forget predictions of huber(s_t - s*_t, delta)`; with the targets of `constants.matched_targets` the
    log-odds become distributed as the holdout's.
    """

    delta: float
    needs = Needs(start=True, target=True)

    def __call__(self, predictions: Predictions, totals: MinibatchTotals) -> Tensor:
        """This rank's share; every forget prediction needs a finite target."""
        chosen, odds = predictions.of_role(is_forget=True), predictions.log_odds
        target = predictions.constants.target_log_odds.detach().to(odds.dtype)
        return huber(odds[chosen] - target[chosen], self.delta).sum() / max(totals.num_forget_tokens, 1)


@dataclass(frozen=True)
class KeptLogOddsTerm:
    """Retain tokens' log-odds are kept where they were.

    `mean over retain predictions of (s_t - s_t at the start)^2 / 2`: zero at the round's start, so a retain record
    costs nothing until the forget term disturbs it; and it does not train the retain records further, as their loss
    would.
    """

    needs = Needs(start=True)

    def __call__(self, predictions: Predictions, totals: MinibatchTotals) -> Tensor:
        """This rank's share; every retain prediction needs its log-odds at the start."""
        chosen, odds = predictions.of_role(is_forget=False), predictions.log_odds
        moved = odds[chosen] - predictions.constants.start_log_odds.detach().to(odds.dtype)[chosen]
        return (moved * moved).sum() / (2 * max(totals.num_retain_tokens, 1))
