"""A checkpoint that does not match its configuration one to one is refused from headers alone; a good one never is."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from distributed_unlearn.config import ModelConfig
from distributed_unlearn.errors import ModelError
from distributed_unlearn.models.fit import check_checkpoint, check_tensors
from distributed_unlearn.models.stored import float_dtype, stored_tensors
from tests.causal_families import ALL, tiny_family, write_family
from tests.classifiers import TASKS, write_classifiers
from tests.engine.checkpoints import odd_llama


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    for name in ("llama", "qwen2", "mixtral"):
        write_family(name, folder)
    tiny_family("llama").save_pretrained(folder / "pieces", max_shard_size=20_000)
    return folder


@pytest.fixture
def spoil(sources, tmp_path):
    """`spoil(source, change)`: a copy whose tensors `change` has changed."""

    def spoiled(source, change):
        folder = shutil.copytree(sources / source, tmp_path / "model")
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return spoiled


def refused(folder, stage=3):
    with pytest.raises(ModelError) as caught:
        check_checkpoint(ModelConfig(path=str(folder)), stage)
    return str(caught.value)


@pytest.mark.parametrize("name", ALL)
def test_good_checkpoints_fit(name, tmp_path):
    write_family(name, tmp_path)
    assert check_tensors(ModelConfig(path=str(tmp_path / name)))


@pytest.mark.parametrize("name", TASKS)
def test_good_classifiers_fit(name, tmp_path):
    write_classifiers(tmp_path)
    assert check_tensors(ModelConfig(path=str(tmp_path / name), task=TASKS[name]))


def test_tied_weights_may_be_stored_twice_and_old_buffers_be_left_over(tmp_path):
    odd_llama().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    check_checkpoint(ModelConfig(path=str(tmp_path)), 3)


def test_another_architecture_s_biases_are_not_dropped_in_silence(sources, tmp_path):
    folder = shutil.copytree(sources / "qwen2", tmp_path / "model")
    shutil.copy(sources / "llama" / "config.json", folder)
    message = refused(folder)
    assert "hold besides 6 weights (model.layers.0.self_attn.k_proj.bias" in message and "'llama'" in message


def test_adapter_tensors_among_the_weights(spoil):
    name = "model.layers.0.self_attn.q_proj.lora_A.weight"
    message = refused(spoil("llama", lambda tensors: tensors.update({name: torch.zeros(2, 32)})))
    assert "hold besides 1 weights" in message and "model.adapter" in message


def test_a_missing_weight(spoil):
    assert "lack 1 weights (model.norm.weight)" in refused(spoil("llama", lambda t: t.pop("model.norm.weight")))


def test_a_missing_expert(spoil):
    name = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    assert "lack a part of a weight" in refused(spoil("mixtral", lambda t: t.pop(name)))


def test_a_wrong_shape(spoil):
    message = refused(spoil("llama", lambda t: t.update({"lm_head.weight": torch.zeros(68, 32)})))
    assert "have another shape for 1 weights (lm_head.weight)" in message


def test_integer_weights(spoil):
    name = "model.layers.0.mlp.up_proj.weight"
    assert f"stored as I8, e.g. {name}" in refused(spoil("llama", lambda t: t.update({name: t[name].to(torch.int8)})))


def test_a_quantised_checkpoint_needs_no_quantiser_to_be_refused(sources, tmp_path):
    folder = shutil.copytree(sources / "llama", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    (folder / "config.json").write_text(json.dumps(config))
    assert "quantised (gptq)" in refused(folder)


def test_sizes_that_no_model_can_have(sources, tmp_path):
    folder = shutil.copytree(sources / "llama", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": -1}))
    assert "config.json" in refused(folder)


def index_of(folder):
    path = folder / "model.safetensors.index.json"
    return path, json.loads(path.read_text())


def test_an_index_with_swapped_files(sources, tmp_path):
    folder = shutil.copytree(sources / "pieces", tmp_path / "model")
    check_checkpoint(ModelConfig(path=str(folder)), 3)
    path, index = index_of(folder)
    places = index["weight_map"]
    first, second = sorted(set(places.values()))[:2]
    swap = {first: second, second: first}
    index["weight_map"] = {key: swap.get(file, file) for key, file in places.items()}
    path.write_text(json.dumps(index))
    assert f"names tensors that {first} does not hold" in refused(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda places: places.update({"model.nowhere.weight": next(iter(places.values()))}), "model.nowhere.weight"),
        (lambda places: places.update({"model.norm.weight": "absent.safetensors"}), "the file absent.safetensors"),
        (lambda places: places.update({"model.norm.weight": "../x.safetensors"}), "outside the checkpoint's folder"),
        (lambda places: places.update({"model.norm.weight": 3}), "cannot be read"),
    ],
)
def test_an_index_that_does_not_fit_its_files(change, message, sources, tmp_path):
    folder = shutil.copytree(sources / "pieces", tmp_path / "model")
    path, index = index_of(folder)
    change(index["weight_map"])
    path.write_text(json.dumps(index))
    assert message in refused(folder)


def test_a_file_that_was_cut_off(sources, tmp_path):
    folder = shutil.copytree(sources / "llama", tmp_path / "model")
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    assert "cannot be loaded" in refused(folder)


def test_the_dtype_of_the_files_is_the_narrowest_that_holds_them(spoil):
    def halve(tensors):
        tensors.update({key: value.bfloat16() for key, value in tensors.items()})

    folder = spoil("llama", halve)
    assert float_dtype(stored_tensors(ModelConfig(path=str(folder)))) == torch.bfloat16
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert float_dtype(stored_tensors(ModelConfig(path=str(folder)))) == torch.float32
