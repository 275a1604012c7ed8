"""Write what the digits recipes start from: a two-layer CNN and a ResNet-18 with random weights, and ids to forget.

    python jobs/digits_checkpoints.py runs/digits            # --overwrite replaces existing folders

Nothing is downloaded. `cnn` (1,898 parameters) reads scikit-learn's digits as they are, 8 x 8; `resnet18` (11.2
million) has an image processor that enlarges them to 32 x 32. The running statistics of its batch normalisation, which
neither training nor unlearning changes, are those of random images: they know nothing of any record. Of the 1,797
digits `holdout_ids.txt` names 297 that are never trained on, and `forget_ids.txt` a tenth of the others. Both are drawn
by --seed: the last digits of the data are by other writers, and harder than what is to be forgotten.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, ResNetConfig, ResNetForImageClassification, ViTImageProcessorPil

from distributed_unlearn.errors import ConfigError
from distributed_unlearn.files import complete_folder, refuse_existing
from distributed_unlearn.models.cnn import TwoLayerCNNConfig, TwoLayerCNNForImageClassification

NUM_DIGITS, NUM_TRAINING = 1797, 1500
NAMES = {number: str(number) for number in range(10)}


def make_cnn() -> PreTrainedModel:
    return TwoLayerCNNForImageClassification(TwoLayerCNNConfig(image_size=8, id2label=NAMES))


def make_resnet18(processor: ViTImageProcessorPil, seed: int) -> PreTrainedModel:
    config = ResNetConfig(
        num_channels=1,
        embedding_size=64,
        hidden_sizes=[64, 128, 256, 512],
        depths=[2, 2, 2, 2],
        layer_type="basic",
        id2label=NAMES,
        label2id={name: number for number, name in NAMES.items()},
    )
    model = ResNetForImageClassification(config)
    noise = np.random.default_rng(seed).integers(0, 256, (256, 8, 8, 1), dtype=np.uint8)
    set_statistics(model, processor(images=list(noise), input_data_format="channels_last", return_tensors="pt"))
    return model


def set_statistics(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> None:
    """Mean and variance of every batch normalisation on one batch, layer after layer."""
    layers = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = None  # the batch's own statistics replace what was there
    with torch.no_grad():
        model.train()(**inputs)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the checkpoints that the digits recipes start from.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true", help="replace the folders if they exist")
    arguments = parser.parse_args()
    folder = arguments.folder
    try:
        for name in ("cnn", "resnet18"):
            refuse_existing(folder / name, arguments.overwrite)
    except ConfigError as error:
        raise SystemExit(f"{error.got}: choose another folder or give --overwrite") from None
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)
    with complete_folder(folder / "cnn", arguments.overwrite) as staging:
        make_cnn().save_pretrained(staging)
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32}, image_mean=[0.5], image_std=[0.5])
    with complete_folder(folder / "resnet18", arguments.overwrite) as staging:
        make_resnet18(processor, arguments.seed).save_pretrained(staging)
        processor.save_pretrained(staging)
    shuffled = np.random.default_rng(arguments.seed).permutation(NUM_DIGITS)
    chosen = {"forget_ids.txt": shuffled[: NUM_TRAINING // 10], "holdout_ids.txt": shuffled[NUM_TRAINING:]}
    for name, indices in chosen.items():
        lines = "".join(f"digit-{index:04d}\n" for index in sorted(indices))
        (folder / name).touch(mode=0o600)  # who asked to be forgotten is for nobody else
        (folder / name).write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()
