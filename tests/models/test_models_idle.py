"""What no prediction depends on: the vision tower of a multimodal model, and nothing of any other."""

import pytest
from transformers import AutoConfig

from distributed_unlearn.models.causal_lm import CausalLM
from distributed_unlearn.models.classifier import ImageClassifier, SequenceClassifier
from distributed_unlearn.models.family import ModelFamily
from distributed_unlearn.models.fit import empty_model
from tests.causal_families import ALL

TEXT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40}
CLASSIFIERS = ("albert", "bert", "deberta-v2", "distilbert", "electra", "gpt2", "llama", "opt", "qwen2", "roberta")


def idle(family: ModelFamily, config: object) -> set[str]:
    return set(family.idle(empty_model(family, config)))


@pytest.mark.parametrize("name", ALL)
def test_of_a_language_model_only_what_sees_images_is_idle(name):
    found = idle(CausalLM(), AutoConfig.for_model(name, **ALL[name]))
    assert bool(found) == (name == "gemma3")
    assert all(key.startswith(("model.vision_tower.", "model.multi_modal_projector.")) for key in found)


def test_all_of_a_vision_tower_is_idle():
    model = empty_model(CausalLM(), AutoConfig.for_model("gemma3", **ALL["gemma3"]))
    names = {name for name, _ in model.named_parameters()}
    text = {name for name in names if name.startswith(("model.language_model.", "lm_head."))}
    assert CausalLM().idle(model) == names - text and len(text) > 20


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_of_a_classifier_of_texts_nothing_is_idle(name):
    assert not idle(SequenceClassifier(), AutoConfig.for_model(name, **TEXT))


def test_of_a_multimodal_classifier_the_vision_tower_is_idle():
    found = idle(SequenceClassifier(), AutoConfig.for_model("gemma3", **ALL["gemma3"]))
    assert found and not any("language_model" in name or "score" in name for name in found)


def test_of_a_classifier_of_images_nothing_is_idle():
    assert not idle(
        ImageClassifier(), AutoConfig.for_model("vit", **{k: v for k, v in TEXT.items() if k != "vocab_size"})
    )
