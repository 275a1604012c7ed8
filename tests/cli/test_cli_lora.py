"""LoRA from the command line: adapters are unlearned and trained, written alone or merged, planned and checked."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from distributed_unlearn.config import LoraAdapter, ModelConfig
from distributed_unlearn.engine.estimate import estimate_memory, measure_model
from tests.cli.command_line import assert_refused, call, succeed
from tests.tiny_job import RECORDS_EACH, TinyJob, save_model

LORA = "model.adapter={name: lora, rank: 2, alpha: 4, target_modules: [q_proj, down_proj]}"
# Layers of width 32, inner width 48: A and B of two targets in each of two layers.
NUM_WEIGHTS = 2 * (2 * (32 + 32) + 2 * (48 + 32))


@pytest.fixture(scope="module")
def unlearned(tiny: TinyJob, tmp_path_factory):
    """A checkpoint folder with the adapter alone."""
    output = tmp_path_factory.mktemp("lora") / "out"
    succeed_quietly(tiny.run(output, LORA))
    return output / "checkpoint"


def succeed_quietly(arguments):
    from distributed_unlearn.cli import main

    assert main(arguments) in (0, 10)


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(3, 23).view(2, 10)).logits


def test_the_adapter_alone_opens_on_its_base(unlearned, tiny: TinyJob):
    assert not (unlearned / "config.json").exists() and not (unlearned / "model.safetensors").exists()
    settings = json.loads((unlearned / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tiny.model.resolve()) and settings["inference_mode"]
    tensors = load_file(unlearned / "adapter_model.safetensors")
    assert sum(value.numel() for value in tensors.values()) == NUM_WEIGHTS
    assert any(value.any() for key, value in tensors.items() if "lora_B" in key)  # it started at zero
    base = AutoModelForCausalLM.from_pretrained(tiny.model)
    before = logits(base)
    assert not torch.equal(logits(PeftModel.from_pretrained(base, unlearned)), before)


def test_an_adapter_folder_is_gone_on_from_and_merged_under_the_base_s_names(
    unlearned, tiny: TinyJob, tmp_path, capsys
):
    output = tmp_path / "out"
    arguments = (f"model.path={unlearned}", "save.adapter=merged", "forget.subjects=[person-0001]")
    succeed(capsys, tiny.run(output, *arguments))
    assert json.loads((output / "record.json").read_text())["num_erased_before"] == RECORDS_EACH
    merged = load_file(output / "checkpoint" / "model.safetensors")
    assert merged.keys() == load_file(tiny.model / "model.safetensors").keys()
    assert not (output / "checkpoint" / "adapter_config.json").exists()
    first = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny.model), unlearned)
    found, base = (
        AutoModelForCausalLM.from_pretrained(output / "checkpoint"),
        load_file(tiny.model / "model.safetensors"),
    )
    changed = {key.split(".")[-2] for key, value in merged.items() if not torch.equal(value, base[key])}
    assert changed == {"q_proj", "down_proj"} and not torch.equal(logits(found), logits(first))


def test_what_an_adapter_forgot_is_known_to_the_job_that_goes_on_from_it(unlearned, tiny: TinyJob, tmp_path, capsys):
    """The base beside it has no record; the adapter's has."""
    _, *arguments = tiny.run(tmp_path / "out", f"model.adapter={{path: {unlearned}}}", "forget.subjects=[person-0001]")
    out = succeed(capsys, ["plan", *arguments]).out
    assert f"erased before: {RECORDS_EACH}, in no retain" in out


def test_training_an_adapter(tiny: TinyJob, tmp_path, capsys):
    output = tmp_path / "out"
    succeed(capsys, tiny.run(output, LORA, "forget=null", "train={epochs: 1, batch_size: 6, learning_rate: 0.01}"))
    tensors = load_file(output / "checkpoint" / "adapter_model.safetensors")
    assert all(value.any() for value in tensors.values())


def test_the_plan_counts_the_adapter_and_keeps_the_base_in_its_own_dtype(tiny: TinyJob, tmp_path, capsys):
    model = tiny.copy_model(tmp_path / "model")
    save_model(model, torch.bfloat16)
    _, *arguments = tiny.run(tmp_path / "out", LORA, f"model.path={model}")
    out = succeed(capsys, ["plan", *arguments]).out
    assert f"{NUM_WEIGHTS:,} trainable" in out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("world_size", "stage"), [(1, 3), (2, 3), (2, 0)])
def test_vectors_have_the_adapter_s_size_and_the_base_is_counted_once_in_its_own_dtype(world_size, stage):
    config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=512)
    model = ModelConfig(path="unused", adapter=LoraAdapter(name="lora", rank=2, target_modules=("q_proj",)))
    size = measure_model(model, config, world_size, stage, torch.bfloat16)
    assert size.num_trainable == 2 * 2 * (64 + 64)
    found = estimate_memory(size, config, torch.float32, stage, 5, 1, 8, 2)
    shares, shard = world_size if stage == 3 else 1, 4 * size.num_trainable // world_size
    frozen = size.num_parameters - size.num_trainable
    replicated = 0 if stage == 3 else 4 * size.num_trainable  # beside the partitioned master
    assert found.weights == 2 * frozen // shares + shard + replicated
    assert (found.vectors, found.host_copies) == (5 * shard, 2 * shard)
    # Of the frozen weights that a pass gathers there is neither tangent nor gradient nor product.
    assert found.gathered == 4 * (size.root.frozen + size.largest_block.frozen + 4 * size.largest_block.trainable)


def test_mistakes_in_an_adapter_are_one_error(tiny: TinyJob, tmp_path, capsys):
    for command in ("plan", "run"):
        _, *arguments = tiny.run(tmp_path / "out", "model.adapter={name: lora, target_modules: [c_attn]}")
        outcome = call(capsys, [command, *arguments])
        assert_refused(outcome, 5, "model", "'c_attn', which the model does not have")
        assert not (tmp_path / "out" / "checkpoint").exists()
    _, *arguments = tiny.run(tmp_path / "out", "model.adapter={name: lora, ranks: 3}")
    assert_refused(call(capsys, ["plan", *arguments]), 3, "configuration", "ranks")


def test_the_check_takes_an_adapter(unlearned, tiny: TinyJob, capsys):
    options = ("--num-workers", "1", "--backend", "in_process", "--batch-size", "2", "--sequence-length", "8")
    for model, adapter in ((tiny.model, unlearned), (tiny.model, "lora"), (unlearned, None)):
        chosen = () if adapter is None else ("--adapter", str(adapter))
        outcome = call(capsys, ["check", "curvature", "--model", str(model), *chosen, *options])
        assert outcome.code == 0, outcome.err
        assert '"passed": true' in outcome.out
