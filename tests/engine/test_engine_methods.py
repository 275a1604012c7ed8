"""Published methods on ranks against loops in float64 on one module; the same for every number of ranks and stage."""

import numpy as np
import pytest
import torch

from distributed_unlearn.config import ModelConfig, RmuConfig
from distributed_unlearn.curvature.reference import frozen_rows
from distributed_unlearn.data.encoding import collate
from distributed_unlearn.data.sampling import draw
from distributed_unlearn.engine.inputs import Minibatch, minibatch_totals
from distributed_unlearn.errors import ModelError
from distributed_unlearn.models.fit import check_layer
from distributed_unlearn.objectives.steering import control_vector
from tests.answer_losses import token_nll
from tests.engine.cases import Problem, assemble, load_float64, loss_of
from tests.engine.checkpoints import FORGET, RETAIN, odd_llama, word_tokenizer
from tests.engine.compare import SUMS, Results
from tests.engine.method_programs import DAMPENING, NUM_STEPS, RATE, SAMPLE, STEPPING, MethodPlan
from tests.engine.ranks import run_on_ranks

pytestmark = pytest.mark.slow

STAGES = {1: (0, 3), 2: (0, 1, 2, 3), 4: (0, 3)}
RETRAINING = {1: (3,), 2: (2, 3), 4: ()}
everywhere = pytest.mark.parametrize(
    ("world_size", "stage"), [(world_size, stage) for world_size, stages in STAGES.items() for stage in stages]
)


@pytest.fixture(scope="module")
def found(checkpoints, corpus, tmp_path_factory):
    """`found.of(world_size, section)`."""
    model = odd_llama()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    model.save_pretrained(checkpoints / "other_llama")
    word_tokenizer().save_pretrained(checkpoints / "other_llama")

    def run(world_size, folder):
        plan = MethodPlan(checkpoints, corpus, STAGES[world_size], RETRAINING[world_size])
        return run_on_ranks("tests.engine.method_programs:run_methods", world_size, folder, plan)

    return Results(tmp_path_factory.mktemp("methods"), run)


def _gradient(model, loss):
    """By name, in float64; zero in the rows that are held fixed."""
    named = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True, materialize_grads=True)
    gradients = dict(zip(named, found, strict=True))
    for name, row in frozen_rows(model).items():
        gradients[name][row] = 0
    return gradients


def _flat(named):
    return torch.cat([named[name].detach().double().reshape(-1) for name in sorted(named)])


def _states(corpus, records, model):
    """The first layer's output at every position that predicts an answer token, record by record."""
    rows = []
    for record in records:
        tokens = collate(corpus, np.array([record]))
        hidden = model(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, output_hidden_states=True
        ).hidden_states[1]
        positions = tokens.answer_mask[0].nonzero().squeeze(1)
        rows += [hidden[0, int(position) - 1] for position in positions if position > 0]
    return torch.stack(rows)


def _steered_loss(corpus, minibatch, model, first, objective):
    """Token by token, with the whole model run."""
    of_forget, of_retain = (_states(corpus, records, model) for records in (minibatch.forget, minibatch.retain))
    with torch.no_grad():
        start = _states(corpus, minibatch.retain, first)
    target = objective.steering_coefficient * control_vector(of_forget.shape[1], 0)
    steered = sum(((row - target) ** 2).mean() for row in of_forget) / len(of_forget)
    kept = sum(((row - was) ** 2).mean() for row, was in zip(of_retain, start, strict=True)) / len(of_retain)
    return steered + objective.retain_weight * kept


@pytest.fixture(scope="module")
def plain(checkpoints, corpus):
    """Losses before each gradient step and the update after all of them, by method."""
    truths = {}
    for method, (_, objective) in STEPPING.items():
        model, first = (load_float64(str(checkpoints / "odd_llama")) for _ in range(2))
        options = {key: value for key, value in objective.model_dump(exclude_defaults=True).items() if key != "name"}
        problem = Problem(objective=method, options=tuple(options.items()))
        start, losses = _flat(dict(model.named_parameters())), []
        for step in range(NUM_STEPS):
            if method == "scrub":  # a descent, an ascent, twice; then descents
                of_forget = step in (1, 3)
                nth = {1: 0, 3: 1}[step] if of_forget else {0: 0, 2: 1, 4: 2, 5: 3}[step]
                minibatch = Minibatch(
                    draw(0, 1, nth, "forget", FORGET, 4 if of_forget else 0),
                    draw(0, 1, nth, "retain", RETAIN, 0 if of_forget else 4),
                )
            else:
                minibatch = Minibatch(draw(0, 1, step, "forget", FORGET, 4), draw(0, 1, step, "retain", RETAIN, 5))
            if method == "rmu":
                loss = _steered_loss(corpus, minibatch, model, first, objective)
            else:
                totals = minibatch_totals(corpus, minibatch)
                loss = loss_of(corpus, problem, minibatch, totals, first)(model)
            gradients = _gradient(model, loss)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter -= RATE * gradients[name]
            losses.append(loss.item())
        truths[method] = losses, _flat(dict(model.named_parameters())) - start, start
    return truths


@everywhere
@pytest.mark.parametrize("method", STEPPING)
def test_steps_are_those_of_the_loop(world_size, stage, method, found, plain):
    ranks = found.of(world_size, f"{method} {stage}")
    losses, update, start = plain[method]
    moved = _flat(assemble([rank["weights"] for rank in ranks], ranks[0]["layout"])) - start
    # fp32 sums through six steps: each step's error is that of a gradient, and the steps pass it on.
    assert float((moved - update).norm() / update.norm()) < 1e-4
    for rank in ranks:
        assert rank["losses"] == pytest.approx(losses, rel=1e-4, abs=1e-6)
    if method == "scrub":
        assert losses[1] < 0 and losses[3] < 0 < min(losses[0], losses[2], losses[4])


@everywhere
def test_steering_leaves_later_layers_alone(world_size, stage, found, checkpoints):
    ranks = found.of(world_size, f"rmu {stage}")
    weights = assemble([rank["weights"] for rank in ranks], ranks[0]["layout"])
    start = dict(load_float64(str(checkpoints / "odd_llama")).named_parameters())
    moved = {name for name, value in weights.items() if not torch.equal(value, start[name].float())}
    assert moved == {name for name in weights if "layers.0" in name or "embed_tokens" in name}


def test_models_without_layers_cannot_be_steered(checkpoints):
    solver = RmuConfig(method="rmu")
    assert check_layer(ModelConfig(path=str(checkpoints / "odd_llama")), solver) == 0
    with pytest.raises(ModelError, match="a model whose layers cannot be told apart"):
        check_layer(ModelConfig(path=str(checkpoints / "blockless")), solver)


@pytest.fixture(scope="module")
def importances(checkpoints, corpus):
    """Sums of the records' squared gradients by role, record by record."""
    sums = {}
    for role, records in {"forget": FORGET, "retain": SAMPLE}.items():
        model = load_float64(str(checkpoints / "odd_llama"))
        total = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
        for record in records:
            tokens = collate(corpus, np.array([record]))
            logits = model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).logits
            loss = token_nll(logits, tokens.input_ids, tokens.answer_mask)[0].sum()
            for name, gradient in _gradient(model, loss).items():
                total[name] += gradient**2
        sums[role] = _flat(total)
    return sums


@everywhere
def test_squares_are_of_single_records(world_size, stage, found, importances):
    """Of a tied embedding both parts are added before the square, and no rank's records are before it."""
    ranks = found.of(world_size, f"ssd {stage}")
    for role, expected in importances.items():
        sums = _flat(assemble([rank["sums"][role] for rank in ranks], ranks[0]["layout"]))
        assert float((sums - expected).norm() / expected.norm()) < 2 * SUMS


@everywhere
def test_weights_that_matter_to_the_forget_set_shrink(world_size, stage, found, importances):
    ranks = found.of(world_size, f"ssd {stage}")
    before, after = (_flat(assemble([rank[key] for rank in ranks], ranks[0]["layout"])) for key in ("before", "after"))
    forget = importances["forget"] / len(FORGET)
    share = len(RETAIN) / len(SAMPLE)
    everything = (importances["forget"] + share * importances["retain"]) / (len(FORGET) + len(RETAIN))
    chosen = forget > DAMPENING.selection_weighting * everything
    expected = torch.where(chosen, before * (DAMPENING.dampening_constant * everything / forget).clamp(max=1), before)
    # Entries whose importances are rounding, or within rounding of the threshold, may go either way.
    margin = (forget - DAMPENING.selection_weighting * everything).abs() / forget.clamp(min=1e-30)
    sure = (margin > 1e-3) | (forget < 1e-12)
    assert 0.95 < float(sure.double().mean()) and 0.05 < float(chosen.double().mean()) < 0.95
    torch.testing.assert_close(after[sure], expected[sure], rtol=1e-3, atol=1e-7)
    untouched = sure & ~chosen
    assert torch.equal(after[untouched], before[untouched])
    for rank in ranks:
        assert rank["done"].num_weights == int((after != before).sum())
        reduction = (1 - after / before)[after != before].mean()
        assert rank["done"].mean_reduction == pytest.approx(float(reduction), rel=1e-4)
        assert rank["norm"] == pytest.approx(float((after - before).norm()), rel=1e-5)


@pytest.mark.parametrize(
    ("world_size", "stage"), [(world_size, stage) for world_size, stages in RETRAINING.items() for stage in stages]
)
def test_a_retraining_is_a_training_in_the_place_of_the_open_model(world_size, stage, found):
    one = found.of(1, "retrain 3")[0]
    for rank in found.of(world_size, f"retrain {stage}"):
        assert torch.equal(rank["trained"], rank["retrained"]) and rank["losses"] == rank["again"]
        assert rank["norms"][0] == pytest.approx(rank["norms"][1], rel=1e-6) and rank["norms"][0] > 0.1
        assert rank["losses"] == pytest.approx(one["losses"], rel=1e-4)
        if rank["scores"] is not None:
            assert rank["scores"].nll == pytest.approx(one["scores"].nll, rel=1e-3)
