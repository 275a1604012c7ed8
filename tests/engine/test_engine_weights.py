"""Weights on shards: tentative updates, the fp32 master, scores, and what collectives move."""

import dataclasses

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from distributed_unlearn.config import ModelConfig
from distributed_unlearn.data.encoding import collate
from distributed_unlearn.engine.estimate import (
    elements_per_gradient,
    elements_per_loss,
    elements_per_product,
    elements_per_refresh,
    measure_model,
)
from tests.answer_losses import correct_tokens, token_nll
from tests.engine.cases import TRAINABLE, assemble
from tests.engine.checkpoints import NUM_RECORDS
from tests.engine.compare import STEP, SUMS

pytestmark = pytest.mark.slow

PLACES = [(world_size, stage) for world_size in (1, 2, 4) for stage in (0, 3)]
everywhere = pytest.mark.parametrize(("world_size", "stage"), PLACES)


def checkpoint_weights(folder, dtype=torch.float32):
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=dtype)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def same(left, right):
    assert set(left) == set(right)
    return all(torch.equal(left[name], right[name]) for name in left)


@everywhere
def test_the_forward_pass_and_deepspeed_see_a_tentative_update(world_size, stage, results, checkpoints):
    """At stage 3 the weights are gathered by DeepSpeed's own `GatheredParameters`, on every rank."""
    ranks = results.of(world_size, f"round {stage}")
    master = assemble([rank["master while tried"] for rank in ranks], ranks[0]["layout"])
    update = assemble([rank["tried"][1] for rank in ranks], ranks[0]["layout"])
    before = checkpoint_weights(checkpoints / "odd_llama")
    assert not same(master, before)
    norm = sum(float(value.double().square().sum()) for value in update.values()) ** 0.5
    assert abs(norm - 0.3) < 1e-5  # minus 0.3 times a unit vector, rounded where it is added to the weights
    for rank in ranks:
        trial, _, seen = rank["tried"]
        assert trial == ranks[0]["tried"][0] and abs(trial.update_norm - 0.3) < 1e-6
        assert same(seen, master)


@everywhere
def test_undo_and_restore_are_bit_for_bit(world_size, stage, results, checkpoints):
    before = checkpoint_weights(checkpoints / "odd_llama")
    for rank in results.of(world_size, f"round {stage}"):
        equal, seen = rank["undone"]
        assert equal and same(seen, before)
        assert rank["loss after undo"] == rank["start"].loss
        assert rank["tried"][0].loss < rank["start"].loss  # so that there was something to undo
        assert rank["restored"] == (True, 0.0)


@everywhere
def test_inner_descent_does_not_depend_on_the_number_of_ranks(world_size, stage, results):
    """The perturbation of a tenth of the gradient is random, and the same everywhere."""
    other = results.of(1, "round 0")[0]
    for rank in results.of(world_size, f"round {stage}"):
        pairs = [(dataclasses.asdict(a), dataclasses.asdict(b)) for a, b in zip(
            [*rank["descent"], rank["descent trial"]], [*other["descent"], other["descent trial"]], strict=True
        )]  # fmt: skip
        for found, expected in pairs:
            assert all(
                abs(found[name] - expected[name]) <= STEP * abs(expected[name]) for name in expected if expected[name]
            )
    assert other["descent"][2].update_norm > other["descent"][1].update_norm > 0


@everywhere
def test_all_ranks_choose_the_mode_together(world_size, stage, results):
    ranks = results.of(world_size, f"modes {stage}")
    assert all(rank == ranks[0] for rank in ranks)
    cached = {name: mode.cached for name, (mode, *_) in ranks[0].items()}
    assert cached == {"none": False, "plenty": True, "default": True}
    sizes = {mode.cached_gib for mode, *_ in ranks[0].values()}
    assert len(sizes) == 1 and 1e-5 < sizes.pop() < 1e-2
    for _, start, entry, _ in ranks[0].values():
        _, other_start, other_entry, _ = ranks[0]["none"]
        assert abs(start.loss - other_start.loss) < SUMS * other_start.loss
        assert abs(start.gradient_norm - other_start.gradient_norm) < SUMS * other_start.gradient_norm
        assert abs(entry.diagonal - other_entry.diagonal) < STEP * abs(other_entry.diagonal)


@everywhere
def test_a_step_gathers_once_a_pass_where_memory_allows(world_size, stage, results, checkpoints):
    """Micro-batches of one record: with a budget for one at a time, each is a pass of its own."""
    model = ModelConfig(path=str(checkpoints / "odd_llama"))
    size = measure_model(model, AutoConfig.from_pretrained(model.path), world_size, stage)
    refresh = 0 if stage == 3 else size.layout.vector_numel * world_size  # of replicated weights, before the trial
    loss = elements_per_loss(size, stage)
    kept = elements_per_gradient(size, stage, True), elements_per_product(size, stage, True), loss + refresh
    num_gradient, num_product = -(-9 // world_size), -(-5 // world_size)
    alone = (
        num_gradient * elements_per_gradient(size, stage, False),
        num_product * elements_per_product(size, stage, False),
        num_gradient * loss + refresh,
    )
    for rank in results.of(world_size, f"modes {stage}"):
        counts = {name: tuple(mode_and_more[3].values()) for name, mode_and_more in rank.items()}
        assert counts == {"none": alone, "plenty": kept, "default": kept}


@everywhere
def test_the_master_keeps_what_bfloat16_cannot(world_size, stage, results, checkpoints):
    """The update is 1e-5 a weight, bfloat16's spacing at 0.3 is 1e-3."""
    ranks = results.of(world_size, f"bf16 {stage}")
    layout = ranks[0]["layout"]
    master = assemble([rank["master"] for rank in ranks], layout)
    expected = assemble([rank["expected"] for rank in ranks], layout)
    assert same(master, expected) and all(value.dtype == torch.float32 for value in master.values())
    assert sum(rank["changed"] for rank in ranks) > 0.9 * layout.num_trainable
    rounded = {name: value.bfloat16() for name, value in master.items()}
    on_disk = checkpoint_weights(checkpoints / "odd_llama", torch.bfloat16)
    unmoved = sum(int((rounded[name] == on_disk[name]).sum()) for name in rounded)
    assert unmoved > 0.9 * layout.num_trainable
    for rank in ranks:
        assert same(rank["forward"], rounded)
        assert rank["undone"][0] and same(rank["undone"][1], rounded)
        assert rank["start"] == ranks[0]["start"] and rank["entry"] == ranks[0]["entry"]
    # bfloat16 has 8 bits: sums in another order change losses in the third digit at most.
    other = results.of(1, "bf16 0")[0]
    assert abs(ranks[0]["start"].loss - other["start"].loss) < 1e-2 * other["start"].loss
    assert abs(ranks[0]["start"].gradient_norm - other["start"].gradient_norm) < 5e-2 * other["start"].gradient_norm


@everywhere
def test_every_record_is_scored_once(world_size, stage, results, checkpoints, corpus):
    model = AutoModelForCausalLM.from_pretrained(checkpoints / "odd_llama", attn_implementation="eager")
    wanted = np.arange(1, NUM_RECORDS)
    tokens = collate(corpus, wanted)
    with torch.no_grad():
        logits = model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).logits
        nll, num_tokens = token_nll(logits.double(), tokens.input_ids, tokens.answer_mask)
    correct = correct_tokens(logits, tokens.input_ids, tokens.answer_mask)
    found = results.of(world_size, f"scores {stage}")
    assert all(rank["some"] is None for rank in found[1:])
    scores = found[0]["some"]
    assert scores.indices.tolist() == wanted.tolist()
    assert scores.num_tokens.tolist() == num_tokens.tolist() == corpus.num_answer_tokens(wanted).tolist()
    assert scores.num_correct.tolist() == correct.tolist()
    np.testing.assert_allclose(scores.nll, nll.numpy(), rtol=SUMS)
    assert len(found[0]["none"].indices) == len(found[0]["none"].nll) == 0


@everywhere
@pytest.mark.parametrize("share", TRAINABLE)
def test_the_plan_counts_what_a_run_moves(world_size, stage, share, results, checkpoints):
    model = ModelConfig(path=str(checkpoints / "odd_llama"), trainable=TRAINABLE[share])
    size = measure_model(model, AutoConfig.from_pretrained(model.path), world_size, stage)
    expected = {
        "gradient cached": elements_per_gradient(size, stage, keep_forward=True),
        "product cached": elements_per_product(size, stage, cached=True),
        "gradient recompute": elements_per_gradient(size, stage, keep_forward=False),
        "gradient keep_forward": elements_per_gradient(size, stage, keep_forward=True),
        "product recompute": elements_per_product(size, stage, cached=False),
        "loss": elements_per_loss(size, stage),
        "exact loss": elements_per_loss(size, stage, exact=True),  # of a model in bfloat16
        "refresh": elements_per_refresh(size, stage),
    }
    for rank in results.of(world_size, f"elements {stage}"):
        for micro_batch_size in (99, 1):  # weights are gathered once a pass, however many micro-batches it has
            found = {name: rank[f"{share} {name} micro {micro_batch_size}"] for name in expected}
            assert found == expected
    saved = expected["product recompute"] - expected["product cached"]
    assert saved > 0 if stage == 3 else saved == 0  # below stage 3 no weight is gathered
