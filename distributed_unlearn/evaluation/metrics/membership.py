"""Membership inference: can records to be forgotten be told from records that the model was never trained on?

Each attack gives every record a score that is the higher the less the model seems to know it.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from distributed_unlearn.errors import DataError
from distributed_unlearn.evaluation.metrics.memorisation import mean_losses
from distributed_unlearn.evaluation.metrics.per_record import Floats, counts_of, lowest_means, rows_of
from distributed_unlearn.evaluation.metrics.two_samples import area_under_curve

LOWEST_SHARE = 0.4
"""Share of an answer's least likely tokens that min-k and min-k++ look at."""
_SMALLEST_VARIANCE = 1e-12


def min_k_scores(nll: ArrayLike, num_tokens: ArrayLike, share: float = LOWEST_SHARE) -> Floats:
    """Minus the mean of the lowest `share` of each answer's log-probabilities: [N] -> [R] (Shi et al. 2024)."""
    return -lowest_means(-np.asarray(nll, dtype=np.float64), num_tokens, share)


def min_k_plus_plus_scores(
    nll: ArrayLike, entropy: ArrayLike, variance: ArrayLike, num_tokens: ArrayLike, share: float = LOWEST_SHARE
) -> Floats:
    """As min-k, of `(log p - mu) / sigma` (Zhang et al. 2025, arXiv 2404.02936).

    Args:
        nll: [N], `-log p` of the label.
        entropy: [N], of the next-token distribution, nats: `mu = E log p = -entropy`.
        variance: [N], `sigma^2 = E (log p)^2 - mu^2` under that distribution.
        num_tokens: [R].
        share: Of an answer's tokens.

    Returns:
        [R]. Where a distribution has all its mass on one token, sigma counts as 1e-6.
    """
    counts = counts_of(num_tokens)
    log_p, mu = -rows_of(nll, counts), -rows_of(entropy, counts)
    sigma = np.sqrt(np.maximum(rows_of(variance, counts), _SMALLEST_VARIANCE))
    return -lowest_means((log_p - mu) / sigma, counts, share)


def zlib_scores(nll: ArrayLike, num_tokens: ArrayLike, compressed_sizes: ArrayLike) -> Floats:
    """Mean loss over the size of the answer's text compressed by zlib, bytes: [N], [R], [R] -> [R] (Carlini 2021)."""
    sizes = np.asarray(compressed_sizes, dtype=np.float64)
    losses = mean_losses(nll, num_tokens)
    assert sizes.shape == losses.shape and bool((sizes > 0).all()), "one size a record, above 0"
    return losses / sizes


def reference_scores(nll: ArrayLike, reference_nll: ArrayLike, num_tokens: ArrayLike) -> Floats:
    """Mean loss minus that of another model on the same records: [N], [N] -> [R]."""
    return mean_losses(nll, num_tokens) - mean_losses(reference_nll, num_tokens)


def mia_auc(forget_scores: ArrayLike, holdout_scores: ArrayLike) -> float:
    """Area under the ROC curve of an attack that calls a record with a low score known.

    `P(a forget record scores below a holdout record) + P(equal) / 2`: 1 is fully known, 0.5 cannot be told apart,
    below it is forgotten beyond what an unseen record is. Compare with the retrained model's, which need not be 0.5.
    """
    return area_under_curve(holdout_scores, forget_scores)


def priv_leak(mia_auc_min_k: float, mia_auc_min_k_retrained: float) -> float:
    """PrivLeak of MUSE (Shi et al. 2024, arXiv 2407.06460), in percent.

    `100 (A_u - A_r) / A_r`, A the area with the holdout set as positive and the log-probability as score, which is
    `1 - mia_auc`: 0 is as private as the retrained model, -100 still fully known, far above 0 over-unlearned.

    Args:
        mia_auc_min_k: `mia_auc` of the min-40 % scores under the unlearned model.
        mia_auc_min_k_retrained: The same under the retrained model; never assumed.

    Raises:
        DataError: the retrained model tells the sets apart without an error, so that there is nothing to compare with.
    """
    ours, reference = 1.0 - mia_auc_min_k, 1.0 - mia_auc_min_k_retrained
    if reference <= 0.0:
        raise DataError(
            "a retrained model that finds every forget record easier than every holdout record",
            "forget and holdout sets of like records, and a reference that was not trained on the forget set",
            "choose a holdout set that is like the forget set, or check the reference",
        )
    return 100.0 * (ours - reference) / reference


@dataclass(frozen=True)
class AttackScores:
    """What each attack makes of one set: [R] each; None where what it needs is not at hand."""

    loss: Floats
    min_k: Floats
    min_k_plus_plus: Floats
    zlib: Floats | None
    """Needs the answers' texts."""
    reference: Floats | None
    """Needs another model."""

    def named(self) -> dict[str, Floats]:
        """The attacks that could be made, by name."""
        found = {"loss": self.loss, "min_k": self.min_k, "min_k_plus_plus": self.min_k_plus_plus}
        found |= {} if self.zlib is None else {"zlib": self.zlib}
        return found | ({} if self.reference is None else {"reference": self.reference})
