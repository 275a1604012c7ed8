"""Adapters: what is refused before a worker starts, which weights they start with, and which base they open on."""

import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from distributed_unlearn.config import AdapterFolder, LoraAdapter, ModelConfig
from distributed_unlearn.errors import ModelError
from distributed_unlearn.models.adapters import initial_weights, insert_adapter
from distributed_unlearn.models.base_of_adapter import opened_as
from distributed_unlearn.models.fit import check_checkpoint
from tests.causal_families import tiny_family, write_family
from tests.engine.checkpoints import odd_llama


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    for name in ("llama", "qwen2"):
        write_family(name, folder)
    odd_llama().save_pretrained(folder / "odd")
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder / "llama"),
        peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False, lora_dropout=0.5),
    )
    model.save_pretrained(folder / "adapter")
    return folder


def lora(path, *targets, **settings):
    return ModelConfig(path=str(path), adapter=LoraAdapter(name="lora", target_modules=targets, **settings))


def refused(config, stage=3):
    with pytest.raises(ModelError) as caught:
        check_checkpoint(config, stage)
    return str(caught.value)


def test_target_modules_that_match_nothing(bases):
    message = refused(lora(bases / "llama", "q_proj", "c_attn", "query"))
    assert "'c_attn', 'query', which the model does not have" in message and "down_proj" in message


def test_target_modules_that_are_no_linear_layers_of_their_own(bases):
    message = refused(lora(bases / "llama", "model.norm", "q_proj"))
    assert "cannot be put into the model (Target module LlamaRMSNorm" in message
    assert "no linear layer of its own" in refused(lora(bases / "llama", "embed_tokens"))
    assert "'lm_head', which is no linear layer of its own" in refused(lora(bases / "odd", "lm_head"))
    check_checkpoint(lora(bases / "llama", "lm_head"), 3)


def test_trainable_patterns_choose_among_the_adapter_s_weights(bases):
    config = lora(bases / "llama", "q_proj")
    check_checkpoint(config.model_copy(update={"trainable": ("*layers.1.*lora_B*",)}), 3)
    assert "matches none of 4" in refused(config.model_copy(update={"trainable": ("*embed_tokens*",)}))


def test_an_adapter_for_another_base_model(bases, tmp_path):
    config = ModelConfig(path=str(bases / "qwen2"), adapter=AdapterFolder(path=str(bases / "adapter")))
    message = refused(config)
    assert f"belongs to the base model '{bases / 'llama'}'" in message and "base_model_name_or_path" in message
    # A base that was moved and kept its name is taken at its word; its shapes then tell.
    moved = shutil.copytree(bases / "odd", tmp_path / "llama")
    adapter = shutil.copytree(bases / "adapter", tmp_path / "adapter")
    rewrite(adapter, base_model_name_or_path="/somewhere/else/llama")
    assert "have another shape" in opening_error(ModelConfig(path=str(moved), adapter=AdapterFolder(path=str(adapter))))
    copied = shutil.copytree(bases / "llama", tmp_path / "copied" / "llama")
    check_checkpoint(ModelConfig(path=str(copied), adapter=AdapterFolder(path=str(adapter))), 3)


def opening_error(config):
    model = AutoModelForCausalLM.from_pretrained(config.path)
    with pytest.raises(ModelError) as caught:
        initial_weights(model, insert_adapter(model, config), config)
    return str(caught.value)


def rewrite(adapter, **settings):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "use_dora is True"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is ['lm_head']"),
        ({"peft_type": "IA3"}, "method is"),
        ({"peft_type": 3}, "cannot be read"),
    ],
)
def test_adapters_that_are_no_plain_lora(settings, message, bases, tmp_path):
    adapter = shutil.copytree(bases / "adapter", tmp_path / "adapter")
    rewrite(adapter, **settings)
    config = ModelConfig(path=str(bases / "llama"), adapter=AdapterFolder(path=str(adapter)))
    assert message in refused(config)


def test_a_folder_without_an_adapter(bases):
    config = ModelConfig(path=str(bases / "llama"), adapter=AdapterFolder(path=str(bases / "odd")))
    assert "without adapter_config.json" in refused(config)


def test_an_adapter_folder_opens_as_its_base_with_the_adapter(bases, tmp_path):
    config = ModelConfig(path=str(bases / "adapter"))
    expected = ModelConfig(path=str(bases / "llama"), adapter=AdapterFolder(path=str(bases / "adapter")))
    assert opened_as(config) == expected and opened_as(expected) == expected
    check_checkpoint(config, 3)
    adapter = shutil.copytree(bases / "adapter", tmp_path / "adapter")
    rewrite(adapter, base_model_name_or_path="/nowhere/at/all")
    assert "base model '/nowhere/at/all' is not there" in refused(ModelConfig(path=str(adapter)))
    rewrite(adapter, base_model_name_or_path=None)
    assert "is not named in its adapter_config.json" in refused(ModelConfig(path=str(adapter)))
    assert "together with model.adapter" in refused(lora(adapter, "q_proj"))


def test_new_weights_are_a_function_of_the_seed_and_leave_the_base_s_function(bases):
    values = []
    for seed in (0, 0, 1):
        model, config = tiny_family("llama"), lora(bases / "llama", "q_proj", rank=4, seed=seed)
        torch.manual_seed(len(values))  # whatever else is drawn
        inserted = insert_adapter(model, config)
        values.append(initial_weights(model, inserted, config))
        assert inserted.names == values[-1].keys() and len(inserted.names) == 4
    first, again, other = values
    assert all(torch.equal(first[name], again[name]) for name in first)
    for name, value in first.items():
        if ".lora_B." in name:
            assert not value.any()
        else:
            assert not torch.equal(value, other[name]) and value.abs().max() <= 32**-0.5
            assert abs(float(value.std()) - 32**-0.5 / 3**0.5) < 0.02


def test_a_folder_s_weights_compute_what_peft_computes(bases):
    """The folder's dropout of 0.5 is left out."""
    config = ModelConfig(path=str(bases / "adapter"))
    model = AutoModelForCausalLM.from_pretrained(bases / "llama")
    config = opened_as(config)
    inserted = insert_adapter(model, config)
    for name, value in initial_weights(model, inserted, config).items():
        model.get_parameter(name).data.copy_(value)
    expected = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases / "llama"), bases / "adapter")
    tokens = torch.arange(20).view(2, 10)
    with torch.no_grad():
        assert torch.equal(model.train()(tokens).logits, expected.eval()(tokens).logits)


def test_tensors_that_do_not_belong(bases, tmp_path):
    adapter = shutil.copytree(bases / "adapter", tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors["base_model.model.elsewhere.lora_A.weight"] = tensors.pop(next(iter(tensors)))
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    message = opening_error(ModelConfig(path=str(bases / "llama"), adapter=AdapterFolder(path=str(adapter))))
    assert "1 are missing, 1 belong to no target module and 0 have another shape" in message
