"""Write a randomly initialised checkpoint: what a training from nothing starts from."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from distributed_unlearn.workers.messages import ArchitectureSettings


def create_checkpoint(model_type: str, settings: ArchitectureSettings, folder: str, seed: int) -> int:
    """Initialise a causal LM from the architecture's configuration and save it; not collective.

    Returns:
        Number of parameters.
    """
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model.save_pretrained(Path(folder))
    return sum(parameter.numel() for parameter in model.parameters())
