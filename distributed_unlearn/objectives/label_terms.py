"""Forget records with wrong labels, drawn once and for all: no two passes over a record see another one."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from distributed_unlearn.objectives.predictions import MinibatchTotals, Predictions
from distributed_unlearn.objectives.terms import Needs


def other_labels(labels: Tensor, uniform: Tensor, num_labels: int) -> Tensor:
    """A label beside the own one, each of the `num_labels - 1` equally likely: int64 [N].

    Args:
        labels: [N], int64, the own ones.
        uniform: [N], numbers in [0, 1), one label each.
        num_labels: at least 2; of a language model its vocabulary.
    """
    assert num_labels > 1, "no other label to choose"
    # In float64 the product of the largest uniform number may round up to num_labels - 1.
    drawn = (uniform.double() * (num_labels - 1)).long().clamp(max=num_labels - 2)
    return drawn + (drawn >= labels)


@dataclass(frozen=True)
class RandomLabelTerm:
    """The loss on random labels (amnesiac unlearning; Graves, Nagisetty, Ganesh 2021, arXiv 2010.10981).

    `mean over forget predictions of -log p(r)`, `r` uniform over all labels (tokens) but the true one. `r` is a
    function of seed, record and place, so the same on every rank, in every step and in a run that is taken up again.
    """

    needs = Needs(uniform=True)

    def __call__(self, predictions: Predictions, totals: MinibatchTotals) -> Tensor:
        """This rank's share; every forget prediction needs its uniform number."""
        uniform = predictions.constants.uniform
        assert uniform is not None, "uniform numbers were not drawn"
        chosen, wide = predictions.of_role(is_forget=True), predictions.wide
        labels = other_labels(predictions.labels[chosen], uniform[chosen], wide.shape[1])
        return functional.cross_entropy(wide[chosen], labels, reduction="sum") / max(totals.num_forget_tokens, 1)
