"""Files have the very keys that the source had, and open with what the ranks held."""

import pickle

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.causal_families import write_family
from tests.engine.cases import assemble
from tests.engine.checkpoints import word_tokenizer
from tests.engine.family_programs import ExportPlan
from tests.engine.ranks import run_on_ranks

pytestmark = pytest.mark.slow

# Renamed (embed_out), renamed and unfused (Mixtral), unfused, dense and sparse mixed, nothing renamed, multimodal.
FAMILIES = ("gpt_neox", "mixtral", "qwen2_moe", "deepseek_v3", "gpt2", "gpt_oss", "gemma3")
PLACES = [(name, stage) for name in FAMILIES for stage in (3, 0)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("names")
    for name in FAMILIES:
        word_tokenizer().save_pretrained(write_family(name, folder / "source"))
    return folder


@pytest.fixture(scope="module")
def exported(folder):
    plan = ExportPlan(folder / "source", tuple(PLACES), folder / "written")
    run_on_ranks("tests.engine.family_programs:export_families", 2, folder / "ranks", plan)
    return [pickle.loads((folder / "ranks" / f"sections.{rank}").read_bytes()) for rank in range(2)]


def is_vision(key):
    return "vision_tower" in key or "multi_modal_projector" in key


def tensors(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        held = load_file(path)
        assert not found.keys() & held.keys()
        found.update(held)
    return found


@pytest.mark.parametrize(("name", "stage"), PLACES)
def test_keys_and_shapes_are_the_source_s(name, stage, exported, folder):
    source, written = tensors(folder / "source" / name), tensors(folder / "written" / f"{name} {stage}")
    assert {key: value.shape for key, value in written.items()} == {k: v.shape for k, v in source.items()}
    changed = {key for key, value in written.items() if not torch.equal(value, source[key])}
    kept = {key for key in source if key.endswith("e_score_correction_bias") or is_vision(key)}
    assert any(map(is_vision, kept)) == (name == "gemma3")
    assert changed == source.keys() - kept  # every parameter that reads text has its part of the update


@pytest.mark.parametrize(("name", "stage"), PLACES)
def test_what_opens_is_what_the_ranks_held(name, stage, exported, folder):
    model, info = AutoModelForCausalLM.from_pretrained(folder / "written" / f"{name} {stage}", output_loading_info=True)
    assert not any(info.values()), info
    ranks = [rank[name, stage] for rank in exported]
    master = assemble([rank["master"] for rank in ranks], ranks[0]["layout"])
    held = dict(model.named_parameters())
    assert master.keys() == {key for key in held if not is_vision(key)}
    assert all(torch.equal(held[key], value) for key, value in master.items())


@pytest.mark.parametrize(("name", "stage"), PLACES)
def test_the_surviving_update_is_read_back_under_the_same_names(name, stage, exported, folder):
    first, second = (rank[name, stage]["surviving"] for rank in exported)
    assert first == second and first.dtype == "float32"
    source, written = tensors(folder / "source" / name), tensors(folder / "written" / f"{name} {stage}")
    norm = sum(float((written[key].double() - source[key].double()).square().sum()) for key in source) ** 0.5
    assert abs(first.saved_update_norm - norm) < 1e-6 * norm and abs(first.projection - 1) < 1e-6
    assert first.share_of_changed_weights > 0.9
