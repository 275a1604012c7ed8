"""A checkpoint before it is opened: its files, its commit on the Hub, its configuration."""

import re
from pathlib import Path
from typing import Any

from transformers import AutoConfig
from transformers.utils import cached_file

from distributed_unlearn.config import ModelConfig
from distributed_unlearn.errors import ModelError
from distributed_unlearn.files import expand_home
from distributed_unlearn.models.base_of_adapter import opened_as
from distributed_unlearn.models.cnn import register_own_models
from distributed_unlearn.models.hub_errors import unreadable


def require_safetensors(path: str) -> None:
    """Refuse a local folder without safetensors weights; a hub name is checked when it is loaded.

    Raises:
        ModelError: no such folder, or no `*.safetensors` in it.
    """
    folder = Path(expand_home(path))
    looks_local = path.startswith((".", "/", "~")) or folder.exists() or path.count("/") > 1
    if not looks_local:
        return
    if not folder.is_dir():
        raise ModelError(f"model path '{path}', which is no folder", "an existing checkpoint folder", "check the path")
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"model path '{path}' without *.safetensors",
            "safetensors weights; pickled weights are never loaded",
            "convert the checkpoint with transformers: model.save_pretrained(folder)",
        )


def find_commit(config: ModelConfig) -> str | None:
    """The commit that a hub name and revision stand for now; None for a folder.

    It is the name of the snapshot folder that the Hub's files are kept in; not every transformers puts it into the
    configuration.

    Raises:
        ModelError: the model cannot be had, with the cause.
    """
    config = opened_as(config)
    path = expand_home(config.path)
    if Path(path).is_dir():
        return None
    try:
        found = cached_file(path, "config.json", revision=config.revision)
    except (OSError, ValueError) as error:
        raise unreadable(config, "config.json", error) from error
    name = Path(str(found)).parent.name
    return name if re.fullmatch("[0-9a-f]{40}", name) else None


def load_model_config(config: ModelConfig) -> Any:
    """The checkpoint's Hugging Face configuration.

    Raises:
        ModelError: it cannot be had, with the cause.
    """
    register_own_models()
    config = opened_as(config)
    path = expand_home(config.path)
    try:
        return AutoConfig.from_pretrained(path, revision=config.revision, trust_remote_code=False)
    except Exception as error:  # of a file that is not what it should be transformers raises whatever comes up
        raise unreadable(config, "config.json", error) from error
