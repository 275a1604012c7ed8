"""AdamW, the only one: the update that training and unlearning make of a gradient and its moments."""

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class AdamWConstants:
    """What AdamW has beside its learning rate and weight decay; torch's values."""

    first_decay: float = 0.9
    second_decay: float = 0.999
    epsilon: float = 1e-8


def adamw_update(
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    count: float,
    learning_rate: float,
    decay: Tensor | None,
    constants: AdamWConstants,
) -> Tensor:
    """`-eta (m^ / (sqrt(v^) + epsilon) + lambda w)`, a new tensor.

    Kingma and Ba 2015, algorithm 1, with the decoupled weight decay of Loshchilov and Hutter 2019: `m <- b1 m +
    (1 - b1) g`, `v <- b2 v + (1 - b2) g^2`, both in place, `m^ = m / (1 - b1^t)`, `v^ = v / (1 - b2^t)`.

    Args:
        gradient: g, of any shape.
        first: m, like `gradient`; zero before the first update.
        second: v, likewise.
        count: t, which number this update is, from 1.
        learning_rate: eta.
        decay: `lambda w` where weights decay and zero elsewhere, see `engine/decay.py`; None without weight decay.
        constants: b1, b2 and epsilon.
    """
    first.lerp_(gradient, 1.0 - constants.first_decay)
    second.mul_(constants.second_decay).addcmul_(gradient, gradient, value=1.0 - constants.second_decay)
    denominator = second.sqrt().div_(math.sqrt(1.0 - constants.second_decay**count)).add_(constants.epsilon)
    update = first.div(denominator).mul_(-learning_rate / (1.0 - constants.first_decay**count))
    return update if decay is None else update.sub_(decay, alpha=learning_rate)
