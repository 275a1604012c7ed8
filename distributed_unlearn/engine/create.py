"""Write a randomly initialised checkpoint: what a training from nothing starts from."""

from pathlib import Path

import torch
from transformers import AutoConfig

from distributed_unlearn.models.family import ModelFamily, build
from distributed_unlearn.workers.messages import ArchitectureSettings


def create_checkpoint(
    family: ModelFamily, model_type: str, settings: ArchitectureSettings, folder: str, seed: int
) -> int:
    """Initialise a model from the architecture's configuration and save it; not collective.

    Returns:
        Number of parameters.
    """
    torch.manual_seed(seed)
    model = build(family, AutoConfig.for_model(model_type, **settings))
    model.save_pretrained(Path(folder))  # type: ignore[operator]
    return sum(parameter.numel() for parameter in model.parameters())
