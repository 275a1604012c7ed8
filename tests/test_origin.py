"""What a run starts from is hashed whole: with an adapter its files and its base's."""

import json

import pytest

from distributed_unlearn.config import AdapterFolder, ModelConfig
from distributed_unlearn.provenance import hash_folder
from distributed_unlearn.rounds.origin import find_origin


@pytest.fixture
def folders(tmp_path):
    """A base model and an adapter of it; files that nobody opens."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    for folder in (base, adapter):
        folder.mkdir()
    (base / "config.json").write_text("{}")
    (base / "model.safetensors").write_bytes(b"base")
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    (adapter / "adapter_model.safetensors").write_bytes(b"adapter")
    return base, adapter


def test_an_adapter_beside_its_base(folders):
    base, adapter = folders
    found = find_origin(ModelConfig(path=str(base), adapter=AdapterFolder(path=str(adapter))), None).base
    assert found.files == hash_folder(base) and len(found.files) == 2
    assert found.others == {str(adapter): hash_folder(adapter)} and len(found.others[str(adapter)]) == 2
    (adapter / "adapter_model.safetensors").write_bytes(b"another")
    assert find_origin(ModelConfig(path=str(base), adapter=AdapterFolder(path=str(adapter))), None).base != found


def test_an_adapter_as_the_model(folders):
    base, adapter = folders
    found = find_origin(ModelConfig(path=str(adapter)), None).base
    assert found.files == hash_folder(adapter) and found.others == {str(base): hash_folder(base)}
    (base / "model.safetensors").write_bytes(b"another")
    assert find_origin(ModelConfig(path=str(adapter)), None).base != found


def test_a_model_alone_and_one_of_the_hub(folders):
    base, _ = folders
    assert find_origin(ModelConfig(path=str(base)), None).base.others == {}
    found = find_origin(ModelConfig(path="somebody/model"), "c" * 40).base
    assert (found.revision, found.files, found.others) == ("c" * 40, None, {})
