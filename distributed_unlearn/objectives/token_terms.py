"""Parts of objectives that look at single predictions: the log-odds of their labels."""

import torch
from torch import Tensor

LOG_ODDS_LIMIT = 1e4
"""Where log-odds are clamped: far beyond what finite logits reach, so only a label without any alternative (all other
logits minus infinity) or an impossible one is held there, with a derivative of zero."""
_EXCLUDED = -1e30
"""The logit that stands in for the label's own when its alternatives are summed; finite, so that a row without any
alternative has derivatives that are zero and not NaN."""


def log_odds(logits: Tensor, labels: Tensor) -> Tensor:
    """`s = log p_y - log(1 - p_y) = z_y - log sum over v != y of exp z_v`, clamped to `+-LOG_ODDS_LIMIT`.

    Nothing cancels: where `p` rounds to 1 (in bfloat16 from `1 - p < 4e-3` on) `s` goes on growing as the logits'
    difference does, and so does its derivative, which is never smaller than 1 in the label's logit. All derivatives
    exist, forward-mode ones too.

    Args:
        logits: [N, V], float32 or wider.
        labels: [N], int64.

    Returns:
        [N], the dtype of `logits`.
    """
    own = labels.unsqueeze(1)
    others = torch.logsumexp(logits.scatter(1, own, _EXCLUDED), 1)
    return (logits.gather(1, own).squeeze(1) - others).clamp(-LOG_ODDS_LIMIT, LOG_ODDS_LIMIT)
