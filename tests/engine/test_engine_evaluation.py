"""Surveys, continuations, probes and rounded weights on 1, 2 and 4 ranks against plain modules in one process."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from torch import nn
from transformers import AutoModelForCausalLM

from distributed_unlearn.engine.quantise import round_to_nearest
from distributed_unlearn.workers.survey import TokenRows
from tests.causal_families import tiny_family
from tests.engine.checkpoints import odd_llama, random_corpus, word_tokenizer
from tests.engine.compare import SUMS, Results
from tests.engine.evaluation_programs import (
    BITS,
    FITTED,
    GROUP,
    NEW_TOKENS,
    PROBE,
    RECORDS,
    STOP,
    TRIED,
    EvaluationPlan,
)
from tests.engine.ranks import run_on_ranks
from tests.families import FAMILIES, VOCABULARY, tiny_model

WORLD_SIZES = (1, 2, pytest.param(4, marks=pytest.mark.slow))
WRITERS = ("odd_llama", "bloom", "mamba", *FAMILIES)
PROMPTS = [[1, 5, 9], [1, 4], [1, 30, 31, 32, 33, 8], [1, 7, 7, 50], [1, 66]]


def other_llama():
    model = odd_llama()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(9)
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def write_models(folder):
    models = {"odd_llama": odd_llama(), "other_llama": other_llama()}
    models |= {name: tiny_model(name) for name in FAMILIES}
    models |= {name: tiny_family(name) for name in ("bloom", "mamba")}
    for name, model in models.items():
        model.save_pretrained(folder / name)
        word_tokenizer().save_pretrained(folder / name)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated")
    write_models(folder)
    return folder


@pytest.fixture(scope="module")
def results(checkpoints, tmp_path_factory):
    def run(world_size, folder):
        plan = EvaluationPlan(checkpoints, random_corpus(), TokenRows.of(PROMPTS), (0, 3), WRITERS)
        return run_on_ranks("tests.engine.evaluation_programs:run_evaluation", world_size, folder, plan)

    return Results(tmp_path_factory.mktemp("ranks"), run)


def log_probabilities(model):
    """By record: float64 [L, V] at its answer positions, and labels [L]."""
    corpus, model, found = random_corpus(), model.double(), []
    for record in RECORDS:
        tokens = torch.from_numpy(corpus.tokens[corpus.offsets[record] : corpus.offsets[record + 1]].astype(np.int64))
        first = int(corpus.prompt_lengths[record])
        with torch.no_grad():
            logits = model(input_ids=tokens[None]).logits[0]
        found.append((torch.log_softmax(logits[first - 1 : -1], 1).numpy(), tokens[first:].numpy()))
    return found


@pytest.fixture(scope="module")
def truth():
    return log_probabilities(odd_llama()), log_probabilities(other_llama())


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_survey_is_what_dense_distributions_say(world_size, stage, results, truth):
    ours, theirs = truth
    found, *others = results.of(world_size, f"survey {stage}")
    assert others == [None] * (world_size - 1)
    assert found.indices.tolist() == RECORDS.tolist()
    assert found.num_tokens.tolist() == [len(labels) for _, labels in ours]
    log_p, labels = np.concatenate([rows for rows, _ in ours]), np.concatenate([labels for _, labels in ours])
    own = log_p[np.arange(len(labels)), labels]
    entropy = -(np.exp(log_p) * log_p).sum(1)
    variance = (np.exp(log_p) * (log_p + entropy[:, None]) ** 2).sum(1)
    other = np.concatenate([rows for rows, _ in theirs])
    divergence = jensenshannon(np.exp(log_p), np.exp(other), axis=1) ** 2
    for values, expected in ((found.nll, -own), (found.entropy, entropy), (found.variance, variance)):
        assert values == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert found.divergence == pytest.approx(divergence, rel=1e-3, abs=1e-6) and divergence.mean() > 0.01
    assert found.rank.tolist() == (log_p > own[:, None]).sum(1).tolist() and found.rank.max() > 5
    assert found.hits.tolist() == (log_p.argmax(1) == labels).tolist()


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_without_a_reference_there_is_no_divergence_and_the_rest_is_the_same(world_size, stage, results):
    found, alone = results.of(world_size, f"survey {stage}")[0], results.of(world_size, f"alone {stage}")[0]
    assert np.isnan(alone.divergence).all()
    assert alone.nll == pytest.approx(found.nll, rel=SUMS, abs=SUMS) and (alone.rank == found.rank).all()


def transformers_continuation(model, prompt):
    ids = torch.tensor([prompt])
    written = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=STOP,
        pad_token_id=0,
    )  # fmt: skip
    return written[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_continuations_are_those_of_transformers_one_prompt_at_a_time(world_size, name, results, checkpoints):
    model = AutoModelForCausalLM.from_pretrained(checkpoints / name, attn_implementation="eager").eval()
    expected = [transformers_continuation(model, prompt) for prompt in PROMPTS]
    for stage in (0, 3):
        found, *others = results.of(world_size, f"written {name} {stage}")
        assert found.rows() == expected and others == [None] * (world_size - 1)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_ranks_without_a_prompt_take_part(world_size, results, checkpoints):
    model = AutoModelForCausalLM.from_pretrained(checkpoints / "odd_llama", attn_implementation="eager").eval()
    found = results.of(world_size, "one prompt 3")[0]
    assert found.rows() == [transformers_continuation(model, PROMPTS[0])]


def block_outputs(model, tokens):
    outputs = []

    def note(module, arguments, output):
        outputs.append(output[0] if isinstance(output, tuple) else output)

    hooks = [layer.register_forward_hook(note) for layer in model.model.layers]
    with torch.no_grad():
        model(input_ids=tokens[None])
    for hook in hooks:
        hook.remove()
    return outputs


def dense_probe():
    """By block: hits on the records that it is tried on."""
    corpus, model = random_corpus(), odd_llama().double()
    rows = {}
    for record in (*FITTED, *TRIED):
        tokens = torch.from_numpy(corpus.tokens[corpus.offsets[record] : corpus.offsets[record + 1]].astype(np.int64))
        first, states = int(corpus.prompt_lengths[record]), block_outputs(model, tokens)
        rows[record] = [state[0, first - 1 : -1].numpy() for state in states], tokens[first:].numpy()
    hits = []
    for block in range(2):
        x = np.concatenate([rows[record][0][block] for record in FITTED])
        y = np.eye(VOCABULARY)[np.concatenate([rows[record][1] for record in FITTED])]
        x = np.hstack([x, np.ones((len(x), 1))])
        square = x.T @ x
        weights = np.linalg.solve(square + PROBE.ridge * np.diag(square).mean() * np.eye(len(square)), x.T @ y)
        tried = np.concatenate([rows[record][0][block] for record in TRIED])
        tried = np.hstack([tried, np.ones((len(tried), 1))])
        hits.append((tried @ weights).argmax(1) == np.concatenate([rows[record][1] for record in TRIED]))
    return np.array(hits)


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_probes_are_ridge_regressions_on_every_blocks_output(world_size, stage, results):
    found, expected = results.of(world_size, f"probe {stage}")[0], dense_probe()
    assert found.indices.tolist() == TRIED.tolist() and found.hits.shape == expected.shape
    assert found.hits.tolist() == expected.tolist() and expected.any()


def rounded_llama():
    model, count = odd_llama(), 0
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear) and module is not model.lm_head:
                for row in module.weight:
                    for group in row.split(GROUP):
                        low, high = group.min(), group.max()
                        levels = torch.linspace(float(low), float(high), 2**BITS)
                        group.copy_(levels[(group[:, None] - levels).abs().argmin(1)])
                count += module.weight.numel()
    return model, count


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_rounding_does_not_depend_on_how_weights_are_partitioned(world_size, stage, results, truth):
    model, count = rounded_llama()
    assert results.of(world_size, f"rounded {stage}") == [count] * world_size
    expected = np.concatenate([-rows[np.arange(len(labels)), labels] for rows, labels in log_probabilities(model)])
    found = results.of(world_size, f"after rounding {stage}")[0]
    assert found.nll == pytest.approx(expected, rel=1e-4, abs=1e-5)
    exact = np.concatenate([-rows[np.arange(len(labels)), labels] for rows, labels in truth[0]])
    assert np.abs(expected - exact).max() > 0.05


def test_rounding_keeps_what_is_on_the_grid_and_rows_of_one_value():
    weight = torch.arange(16.0).repeat(2, 1)
    assert torch.equal(round_to_nearest(weight, 4, 16), weight)
    assert torch.equal(round_to_nearest(torch.full((2, 3), 0.7), 4, 2), torch.full((2, 3), 0.7))
    assert round_to_nearest(torch.tensor([[0.0, 0.4, 1.0]]), 1, 3).tolist() == [[0.0, 0.0, 1.0]]
