"""Tiny random classifiers of texts and images, their records, and the objective on all of them as one function."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForImageClassification, AutoModelForSequenceClassification

from distributed_unlearn.config import ModelTask, ObjectiveConfig
from distributed_unlearn.data.images import ImageCorpus
from distributed_unlearn.data.text_classes import TextClassCorpus
from distributed_unlearn.models.cnn import register_own_models

NUM_CLASSES, NUM_RECORDS, VOCABULARY, PIXELS = 3, 10, 41, 8
FORGET, RETAIN = np.arange(0, 4), np.arange(4, NUM_RECORDS)
HOLDOUT_LOSS = 0.4
TASKS: dict[str, ModelTask] = {
    "cnn": "image_classification",
    "resnet": "image_classification",
    "vit": "image_classification",
    "bert": "sequence_classification",
    "llama": "sequence_classification",
}
NUM_BLOCKS = {"cnn": 2, "resnet": 3, "vit": 2, "bert": 2, "llama": 2}


def _config(name: str):
    transformer = {
        "hidden_size": 12,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "initializer_range": 0.3,
        "num_labels": NUM_CLASSES,
    }
    images = {"num_channels": 1, "num_labels": NUM_CLASSES}
    texts = {"vocab_size": VOCABULARY, "max_position_embeddings": 32, "pad_token_id": 0}
    settings = {
        "cnn": ("two_layer_cnn", images | {"image_size": PIXELS, "first_channels": 3, "second_channels": 4}),
        # The second stage of one layer, of which nothing divides by 4.
        "resnet": (
            "resnet",
            images | {"embedding_size": 3, "hidden_sizes": [4, 5], "depths": [2, 1], "layer_type": "basic"},
        ),
        "vit": ("vit", transformer | {"image_size": PIXELS, "patch_size": 4, "num_channels": 1}),
        "bert": ("bert", transformer | texts),
        "llama": ("llama", transformer | texts | {"num_key_value_heads": 1}),
    }
    model_type, values = settings[name]
    return AutoConfig.for_model(model_type, **values)


def tiny_classifier(name: str) -> torch.nn.Module:
    """In float32 and `eval()` mode; statistics of batch normalisation are far from 0 and 1."""
    register_own_models()
    auto_class = {
        "image_classification": AutoModelForImageClassification,
        "sequence_classification": AutoModelForSequenceClassification,
    }[TASKS[name]]
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = auto_class.from_config(_config(name), attn_implementation="eager", dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:  # biases and norms start at constants, which would hide a mistake
                    parameter.add_(0.1 * torch.randn_like(parameter))
            for module in model.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.running_mean.normal_(0, 0.3)
                    module.running_var.uniform_(0.5, 2)
                    module.num_batches_tracked.fill_(5)
    return model.eval()


def write_classifiers(folder: Path) -> None:
    for name in TASKS:
        tiny_classifier(name).save_pretrained(folder / name)


def corpus_for(name: str):
    generator = np.random.default_rng(3)
    classes = generator.integers(0, NUM_CLASSES, NUM_RECORDS)
    if TASKS[name] == "image_classification":
        values = generator.standard_normal((NUM_RECORDS, 1, PIXELS, PIXELS)).astype(np.float32)
        return ImageCorpus(values, classes)
    lengths = generator.integers(3, 13, NUM_RECORDS)
    tokens = generator.integers(0, VOCABULARY, lengths.sum(), dtype=np.int32)  # the pad token occurs as any other
    return TextClassCorpus(tokens, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), classes, 0)


def whole_loss(name: str) -> Callable[[torch.nn.Module], torch.Tensor]:
    """The objective holdout_matched on all records; each goes through the model alone, so nothing is padded."""
    corpus, delta = corpus_for(name), ObjectiveConfig().huber_delta
    classes = torch.from_numpy(corpus.classes)

    def loss(module: torch.nn.Module) -> torch.Tensor:
        logits = torch.cat([module(**_alone(corpus, index)).logits for index in range(NUM_RECORDS)])
        nll = torch.nn.functional.cross_entropy(logits, classes, reduction="none")
        distance = nll[: len(FORGET)] - HOLDOUT_LOSS
        clipped = distance.clamp(-delta, delta)
        return nll[len(FORGET) :].mean() + (clipped * (distance - clipped / 2)).mean()

    return loss


def _alone(corpus, index: int) -> dict[str, torch.Tensor]:
    if isinstance(corpus, ImageCorpus):
        return {"pixel_values": torch.from_numpy(corpus.values[index : index + 1]).double()}
    tokens = corpus.tokens[corpus.offsets[index] : corpus.offsets[index + 1]]
    return {"input_ids": torch.from_numpy(tokens.astype(np.int64)).unsqueeze(0), "use_cache": False}
