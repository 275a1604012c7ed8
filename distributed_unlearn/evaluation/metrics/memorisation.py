"""How much of each answer a model knows by heart: probability, exact memorisation, extraction strength."""

import numpy as np
from numpy.typing import ArrayLike

from distributed_unlearn.evaluation.metrics.per_record import Floats, counts_of, means, starts_of


def mean_losses(nll: ArrayLike, num_tokens: ArrayLike) -> Floats:
    """`nll_i / L_i` in nats per token: [N] of `-log p` -> [R]."""
    return means(nll, num_tokens)


def normalised_probabilities(nll: ArrayLike, num_tokens: ArrayLike) -> Floats:
    """`P_i = exp(-(1/L_i) sum_t -log p_t)`, the geometric mean of an answer's token probabilities: [N] -> [R].

    The end-of-sequence token is one of the L_i where the records have one (Maini et al. 2024, arXiv 2401.06121). The
    mean over records is of these, never pooled over tokens.
    """
    return np.exp(-means(nll, num_tokens))


def exact_memorisation(hits: ArrayLike, num_tokens: ArrayLike) -> Floats:
    """Share of each answer's positions whose teacher-forced argmax is the label: [N] of booleans -> [R], 0 to 1."""
    return means(np.asarray(hits, dtype=np.bool_), num_tokens)


def extraction_strength(hits: ArrayLike, num_tokens: ArrayLike, floored: bool = False) -> Floats:
    """Share of each answer that the model completes by itself once it is given the rest (Carlini et al. 2021).

    `1 - k/L` with k the smallest position from which on every teacher-forced argmax is the label; 0 where not even the
    last one is.

    Args:
        hits: [N] of booleans: whether the argmax is the label.
        num_tokens: [R].
        floored: as OpenUnlearning's loop has it, which never returns less than 1/L.

    Returns:
        [R], 0 to 1.
    """
    counts = counts_of(num_tokens)
    missed = ~np.asarray(hits, dtype=np.bool_)
    assert missed.shape == (int(counts.sum()),), "one row a prediction"
    starts = starts_of(counts)
    position = np.arange(len(missed)) - np.repeat(starts, counts)
    given = 1 + np.maximum.reduceat(np.where(missed, position, -1), starts)
    known = counts - given
    return (np.maximum(known, 1) if floored else known) / counts
