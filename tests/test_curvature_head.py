"""Rows chosen before the output embedding: the same numbers as choosing them after it, and never a logit more."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from distributed_unlearn.curvature.head import rows_before_head
from distributed_unlearn.curvature.precision import LiftFloat32Casts
from distributed_unlearn.curvature.trace import LossShare
from distributed_unlearn.data.encoding import TokenBatch, TokenCorpus, collate
from distributed_unlearn.errors import ModelError
from tests.bench import Bench
from tests.families import VOCABULARY, RandomBatch, random_batch, tiny_model

# Logits scaled (Cohere) and soft-capped (Gemma 2) after the head, tied and untied heads, a head with another name.
FAMILIES = ("llama", "gemma", "gpt_neox", "cohere", "gemma2")
BATCH = random_batch(VOCABULARY, 3, 9, seed=1)
MODES = [("hessian", "recompute"), ("hessian", "cached"), ("gauss_newton", "recompute"), ("gauss_newton", "cached")]


def model_of(family):
    if family not in ("cohere", "gemma2"):
        return tiny_model(family, dtype=torch.float64)
    config = AutoConfig.for_model(
        family, vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=64, initializer_range=0.3,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    if family == "gemma2":
        config.final_logit_softcapping = 1.5  # so low that it bends these small logits
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    return model.double().eval()


class Selected(Bench):
    """As `Bench`, but the loss is given rows, and every logit that the head makes is counted."""

    def __init__(self, model, batch, before_head=True):
        super().__init__(model, batch)
        found = TokenBatch(*batch).predictions()
        self.positions, self.labels, self.before_head = found.positions, found.labels, before_head

    def loss_of_rows(self, logits):
        assert logits.shape == (len(self.positions), VOCABULARY)
        # Neither linear in the logits nor a cross-entropy: the Gauss-Newton product sees its second derivative.
        losses = functional.cross_entropy(logits, self.labels, reduction="none")
        return (losses * losses).sum() / self.num_tokens

    def loss_of_logits(self, logits):
        return self.loss_of_rows(logits.reshape(-1, logits.shape[-1])[self.positions])

    def linearise(self, product="hessian", mode="recompute"):
        positions, loss = (self.positions, self.loss_of_rows) if self.before_head else (None, self.loss_of_logits)
        share = LossShare(self.batch.inputs, loss, positions)
        return super().linearise(product, mode, [share])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("product", "mode"), MODES)
def test_loss_gradient_and_product_equal_those_of_all_logits(family, product, mode):
    bench = Selected(model_of(family), BATCH)
    shapes = []

    def note(module, args, output):
        shapes.append(tuple(output.shape))

    handle = bench.model.get_output_embeddings().register_forward_hook(note)
    tangent = bench.tangent(3)
    with LiftFloat32Casts():
        found, gradient = bench.zeros(), bench.zeros()
        loss = bench.linearise(product, mode).product(bench.vector(tangent), found, gradient)
        scored = bench.linearise().loss()
        handle.remove()
        truth = bench.truth(tangent, product)
    rows = (1, len(bench.positions), VOCABULARY)
    assert shapes and set(shapes) == {rows}, f"{set(shapes)}, expected {rows} alone"
    torch.testing.assert_close(loss, truth.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(scored, loss, rtol=1e-12, atol=0)
    wanted = bench.flatten(truth.hvp)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9 * float(wanted.abs().max()))
    other = Selected(bench.model, BATCH, before_head=False)
    with LiftFloat32Casts():
        uncut, uncut_gradient = other.zeros(), other.zeros()
        other.linearise(product, mode).product(other.vector(tangent), uncut, uncut_gradient)
    torch.testing.assert_close(gradient, uncut_gradient, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(found, uncut, rtol=1e-10, atol=1e-11 * float(uncut.abs().max()))


def test_no_prediction_at_all_is_an_exact_zero():
    """What a rank without records does: it still enters every collective."""
    empty = collate(TokenCorpus(np.zeros(5, np.int32), np.array([0, 5]), np.array([2], np.int32), 0), np.zeros(0, int))
    bench = Selected(model_of("llama"), RandomBatch(empty.input_ids, empty.attention_mask, empty.answer_mask))
    bench.num_tokens = 4  # of the other ranks
    for product, mode in MODES:
        found, gradient = bench.zeros(), bench.zeros()
        assert bench.linearise(product, mode).product(bench.vector(bench.tangent(3)), found, gradient) == 0
        assert not found.any() and not gradient.any()


class Headless(nn.Module):
    """A model that names no output embedding."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 7)

    def forward(self, ids):
        return self.table(ids)


def test_without_a_head_rows_are_chosen_afterwards():
    model, ids = Headless(), torch.tensor([[0, 1, 2], [3, 4, 0]])
    with rows_before_head(model, torch.tensor([1, 5])) as selection:
        rows = selection.rows(model(ids))
    assert torch.equal(rows, model.table.weight[[1, 0]])
    with rows_before_head(model, None) as selection:
        assert selection.rows(model(ids)).shape == (2, 3, 7)


def test_a_head_that_is_called_twice_is_refused():
    model, ids = tiny_model("llama"), torch.tensor([[3, 4, 5]])
    with rows_before_head(model, torch.tensor([1])) as selection:
        model(input_ids=ids)
        logits = model(input_ids=ids).logits
        with pytest.raises(ModelError, match="2 calls of the output embedding"):
            selection.rows(logits)
    assert model(input_ids=ids).logits.shape[1] == 3, "the hook outlived its context"
