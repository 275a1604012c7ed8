"""The optimiser of training: torch's AdamW but for one row, whatever the cut; and the decay of unlearning."""

import pytest
import torch
from torch import nn

from distributed_unlearn.engine.optimizer import AdamW, parameter_groups
from distributed_unlearn.solvers.adamw import AdamWConstants, adamw_update

DECAY, ROW = 0.5, 2


class Embedded(nn.Module):
    """An embedding with a frozen row, a matrix, a vector, and a matrix that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.linear = nn.Embedding(5, 3, padding_idx=ROW), nn.Linear(3, 4)
        self.left_alone = nn.Linear(2, 2).requires_grad_(False)
        with torch.no_grad():
            self.embedding.weight[ROW] = 1.0


@pytest.fixture
def model():
    torch.manual_seed(1)
    return Embedded().double()


def gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    found = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in model.named_parameters()}
    found["embedding.weight"][ROW] = 0.0
    return found


def test_groups_are_matrices_vectors_and_the_embedding_alone(model):
    groups = parameter_groups(model, DECAY)
    assert [[tuple(p.shape) for p in group["params"]] for group in groups] == [[(5, 3)], [(4, 3)], [(4,)]]
    assert [group["weight_decay"] for group in groups] == [DECAY, DECAY, 0.0]


def test_three_steps_are_those_of_torch_and_the_frozen_row_stays(model):
    torch.manual_seed(1)
    other = Embedded().double()
    ours = AdamW(parameter_groups(model, DECAY), 0.1, 0)
    matrices = [other.embedding.weight, other.linear.weight]
    theirs = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": DECAY}, {"params": [other.linear.bias], "weight_decay": 0.0}], lr=0.1
    )
    for step in range(3):
        for owner in (model, other):
            for name, value in gradients(owner, step).items():
                owner.get_parameter(name).grad = value if owner.get_parameter(name).requires_grad else None
        for optimizer in (ours, theirs):
            for group in optimizer.param_groups:
                group["lr"] = 0.1 / (1 + step)
            optimizer.step()
    assert (model.embedding.weight[ROW] == 1.0).all()
    with torch.no_grad():
        other.embedding.weight[ROW] = 1.0
    for name, value in model.named_parameters():
        assert torch.allclose(value, other.get_parameter(name), rtol=1e-12, atol=1e-12), name


@pytest.mark.parametrize("num_parts", [1, 2, 3, 4, 8])
def test_parts_are_updated_as_the_whole(model, num_parts):
    """As DeepSpeed cuts a group of one parameter: equal parts of the flattened and padded whole."""
    (group, *_) = parameter_groups(model, DECAY)
    whole = group["params"][0]
    gradient = gradients(model, 0)["embedding.weight"]
    length = -(-whole.numel() // num_parts) + 1
    padded = [nn.functional.pad(t.detach().reshape(-1), (0, num_parts * length - 15)) for t in (whole, gradient)]
    parts = []
    for rank in range(num_parts):
        weights, gradient_part = (t[rank * length : (rank + 1) * length].clone() for t in padded)
        weights.grad = gradient_part
        AdamW([{**group, "params": [weights]}], 0.1, rank).step()
        parts.append(weights)
    whole.grad = gradient
    AdamW([group], 0.1, 0).step()
    assert torch.equal(torch.cat(parts)[:15].view(5, 3), whole.detach())
    assert (whole[ROW] == 1.0).all() and not (whole[ROW - 1] == padded[0][3:6]).any()


def test_the_update_is_that_of_the_formula():
    gradient, weights = torch.tensor([3.0], dtype=torch.float64), torch.tensor([10.0], dtype=torch.float64)
    moments = torch.zeros(2, 1, dtype=torch.float64)
    first = adamw_update(gradient, moments[0], moments[1], 1, 0.1, None, AdamWConstants())
    assert abs(float(first) + 0.1) < 1e-8  # m^ / sqrt(v^) = sign(g)
    second = adamw_update(-gradient, moments[0], moments[1], 2, 0.1, weights * 0.5, AdamWConstants())
    m, v = (0.9 * 0.3 - 0.3) / (1 - 0.81), 9.0
    assert abs(float(second) + 0.1 * (m / v**0.5 + 5.0)) < 1e-8
