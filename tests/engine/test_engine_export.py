"""What is written is a complete Hugging Face checkpoint with exactly the weights that the ranks hold."""

import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.engine.cases import assemble

pytestmark = pytest.mark.slow

PLACES = [(1, 0), (1, 3), (2, 0), (2, 3), (4, 3)]
everywhere = pytest.mark.parametrize(("world_size", "stage"), PLACES)


def exported(results, world_size, stage, name):
    ranks = [found[name] for found in results.of(world_size, f"export {stage}")]
    assert all(rank["surviving"] == ranks[0]["surviving"] for rank in ranks)
    return ranks[0]["folder"], assemble([rank["master"] for rank in ranks], ranks[0]["layout"]), ranks[0]["surviving"]


def load(folder, dtype="auto"):
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=dtype)
    return model.eval()


def stored(folder):
    """Every tensor of every safetensors file, which must not name one twice."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as reader:
            for name in reader.keys():  # noqa: SIM118
                assert name not in found
                found[name] = reader.get_tensor(name)
    return found


@everywhere
@pytest.mark.parametrize("name", ["whole", "pieces", "widened"])
def test_the_checkpoint_opens_and_computes_the_same_logits(world_size, stage, name, results, checkpoints):
    folder, master, surviving = exported(results, world_size, stage, name)
    model, expected = load(folder), load(checkpoints / "odd_llama", torch.float32)
    expected.load_state_dict({**expected.state_dict(), **master, "lm_head.weight": master["model.embed_tokens.weight"]})
    assert model.dtype == torch.float32
    tokens = torch.arange(3, 23).view(2, 10)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, expected(tokens).logits)
    assert surviving.dtype == "float32" and abs(surviving.projection - 1) < 1e-6
    assert abs(surviving.saved_update_norm - surviving.update_norm) < 1e-6 * surviving.update_norm
    assert surviving.update_norm > 1e-4 and surviving.share_of_changed_weights > 0.9


@everywhere
@pytest.mark.parametrize("name", ["whole", "pieces"])
def test_tied_weights_are_written_once_and_stay_tied(world_size, stage, name, results):
    folder, master, _ = exported(results, world_size, stage, name)
    tensors, model = stored(folder), load(folder)
    assert set(tensors) == set(master)  # no lm_head.weight
    assert all(torch.equal(tensors[name], master[name]) for name in master)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@everywhere
def test_small_files_have_an_index(world_size, stage, results):
    folder, master, _ = exported(results, world_size, stage, "pieces")
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(files) > 2 and "model.safetensors" not in files
    assert set(index["weight_map"].values()) == set(files) and set(index["weight_map"]) == set(master)
    assert index["metadata"]["total_size"] == sum(value.numel() * 4 for value in master.values())
    largest = max(value.numel() * 4 for value in master.values())
    limit = 2e-6 * 2**30
    for file in files:
        with safe_open(folder / file, framework="pt") as reader:
            names = list(reader.keys())
            size = sum(reader.get_tensor(name).numel() * 4 for name in names)
        assert all(index["weight_map"][name] == file for name in names)
        assert size <= limit or (len(names) == 1 and size <= largest)


@everywhere
def test_a_tiny_update_is_rounded_away_in_bfloat16_and_kept_beside_it(world_size, stage, results):
    """1e-5 a weight where bfloat16's spacing is about 1e-3: the files hold the old model, and the record says so."""
    folder, master, surviving = exported(results, world_size, stage, "rounded")
    assert surviving.dtype == "bfloat16" and surviving.projection < 0.9
    assert surviving.share_of_changed_weights < 0.1
    model = load(folder)
    assert model.dtype == torch.bfloat16
    assert all(torch.equal(p, master[name].bfloat16()) for name, p in model.named_parameters())
    kept = load(folder / "fp32_master")
    assert kept.dtype == torch.float32
    assert all(torch.equal(p, master[name]) for name, p in kept.named_parameters())


def test_configuration_and_tokenizer_travel_along(results, checkpoints):
    folder, _, _ = exported(results, 2, 3, "whole")
    assert (folder / "generation_config.json").exists()
    text = "w5 w6 w7"
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in (folder, checkpoints / "odd_llama")]
    assert tokenizers[0](text).input_ids == tokenizers[1](text).input_ids == [5, 6, 7]
    before, after = (json.loads((path / "config.json").read_text()) for path in (checkpoints / "odd_llama", folder))
    assert after == before


def test_the_number_of_ranks_leaves_no_trace_in_the_files(results):
    contents = [stored(exported(results, world, stage, "pieces")[0]) for world, stage in PLACES]
    for other in contents[1:]:
        assert list(other) == list(contents[0])
        assert all(torch.equal(other[name], contents[0][name]) for name in other)
