"""An adapter on a bfloat16 base: the base is held once, in its own dtype, and both written forms are the same model."""

import pickle

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.engine.ranks import run_on_ranks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(checkpoints, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    run_on_ranks("tests.engine.family_programs:open_adapters", 2, folder / "ranks", checkpoints)
    return [pickle.loads((folder / "ranks" / f"sections.{rank}").read_bytes()) for rank in range(2)]


@pytest.mark.parametrize("place", [(0, "float32"), (3, "float32"), (3, "bfloat16")])
def test_the_base_is_held_once_in_its_own_dtype_and_used_in_the_compute_dtype(place, ranks, checkpoints):
    source = load_file(checkpoints / "odd_llama_bf16" / "model.safetensors")["model.embed_tokens.weight"]
    for rank in ranks:
        found = rank[place]
        assert found["held"] == torch.bfloat16 and found["copies"] is None and found["master"] == torch.float32
        assert found["used"].dtype == getattr(torch, place[1]) and found["exact"].dtype == torch.float32
        assert torch.equal(found["used"].bfloat16(), source) and torch.equal(found["exact"], source.float())


@pytest.mark.parametrize("stage", [0, 3])
def test_frozen_weights_of_float16_files_stay_in_float16(stage, ranks, checkpoints):
    source = load_file(checkpoints / "odd_llama_fp16" / "model.safetensors")["model.embed_tokens.weight"]
    for rank in ranks:
        found = rank["float16", stage]
        assert found["held"] == torch.float16 and found["copies"] is None and found["master"] == torch.float32
        assert torch.equal(found["used"], source.float()) and torch.equal(found["exact"], source.float())


@pytest.mark.parametrize("stage", [0, 3])
def test_the_merged_checkpoint_is_the_base_plus_the_adapter(stage, ranks, checkpoints):
    base = load_file(checkpoints / "odd_llama_bf16" / "model.safetensors")
    merged = load_file(checkpoints / f"merged {stage}" / "model.safetensors")
    adapter = load_file(checkpoints / f"adapter {stage}" / "adapter_model.safetensors")
    assert merged.keys() == base.keys() and all(value.dtype == torch.bfloat16 for value in merged.values())
    assert len(adapter) == 8 and all(value.dtype == torch.float32 for value in adapter.values())
    for key, value in base.items():
        stem = f"base_model.model.{key.removesuffix('.weight')}"
        if f"{stem}.lora_A.weight" in adapter:
            a, b = (adapter[f"{stem}.lora_{part}.weight"] for part in "AB")
            value = (value.float() + 5 / 3 * (b @ a)).bfloat16()
        assert torch.equal(merged[key], value), key


@pytest.mark.parametrize("stage", [0, 3])
def test_peft_opens_the_adapter_and_computes_what_the_merged_checkpoint_does(stage, ranks, checkpoints):
    base = AutoModelForCausalLM.from_pretrained(checkpoints / "odd_llama_bf16", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, checkpoints / f"adapter {stage}").eval()
    merged = AutoModelForCausalLM.from_pretrained(checkpoints / f"merged {stage}", dtype=torch.float32).eval()
    tokens = torch.arange(3, 23).view(2, 10)
    with torch.no_grad():
        first, second = adapted(tokens).logits, merged(tokens).logits
    assert (first - second).abs().max() < 2e-2 * first.abs().max()  # weights rounded to 8 bits


def test_what_survives_is_measured_on_the_written_tensors(ranks):
    for stage in (0, 3):
        alone, merged = ranks[0][stage, "adapter"], ranks[0][stage, "merged"]
        assert alone == ranks[1][stage, "adapter"] and merged == ranks[1][stage, "merged"]
        assert alone.dtype == "float32" and abs(alone.projection - 1) < 1e-6
        assert merged.dtype == "bfloat16" and 0.9 < merged.projection < 1.1
        assert abs(merged.update_norm - ranks[0][3, "merged"].update_norm) < 1e-6 * merged.update_norm
