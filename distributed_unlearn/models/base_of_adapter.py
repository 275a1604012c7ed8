"""Which base model an adapter folder belongs to."""

import json
from pathlib import Path

from distributed_unlearn.config import AdapterFolder, ModelConfig
from distributed_unlearn.errors import ModelError
from distributed_unlearn.files import expand_home

ADAPTER_CONFIG = "adapter_config.json"


def opened_as(config: ModelConfig) -> ModelConfig:
    """What is opened for `config`: itself, or for an adapter folder as `path` its base with the adapter.

    Raises:
        ModelError: an adapter folder whose base is not named or is a folder that does not exist; or two adapters.
    """
    folder = Path(expand_home(config.path))
    if (folder / "config.json").is_file() or not (folder / ADAPTER_CONFIG).is_file():
        return config
    if config.adapter is not None:
        raise ModelError(
            f"model.path '{config.path}', an adapter, together with model.adapter",
            "one adapter",
            "set model.path to the base model and model.adapter to {path: FOLDER}",
        )
    base = _recorded_base(folder)
    looks_local = base is not None and (base.startswith((".", "/", "~")) or base.count("/") > 1)
    if base is None or (looks_local and not Path(expand_home(base)).is_dir()):
        raise ModelError(
            f"model.path '{config.path}', an adapter whose base model "
            + ("is not named in its adapter_config.json" if base is None else f"'{base}' is not there"),
            "a base model that can be found",
            "set model.path to the base model and model.adapter to {path: FOLDER} with this folder",
        )
    return config.model_copy(
        update={"path": expand_home(base), "revision": None, "adapter": AdapterFolder(path=config.path)}
    )


def reference_model(config: ModelConfig, path: str) -> ModelConfig:
    """The model at `path`, opened as `config`'s is: the retrained reference of a job."""
    return config.model_copy(update={"path": expand_home(path), "revision": None, "adapter": None, "trainable": "all"})


def model_to_retrain(config: ModelConfig, path: str) -> ModelConfig:
    """The checkpoint before fine-tuning at `path`, of which the same weights are trainable as of `config`'s."""
    return config.model_copy(update={"path": expand_home(path), "revision": None})


def refuse_other_base(recorded: str | None, path: str, adapter: str) -> None:
    """Refuse an adapter that says it belongs to another base than `path`.

    The same are: equal names, one folder by two paths, and a folder that was moved and kept its name.

    Raises:
        ModelError: another base.
    """
    if not recorded or recorded == path:
        return
    first, second = Path(expand_home(recorded)), Path(expand_home(path))
    if first.is_dir() and second.is_dir() and first.resolve() == second.resolve():
        return
    if not first.is_dir() and second.is_dir() and first.name == second.resolve().name:
        return
    raise ModelError(
        f"the adapter '{adapter}', which belongs to the base model '{recorded}', and model.path '{path}'",
        "the base model that the adapter was trained on",
        "set model.path to it; or, if it was renamed, correct base_model_name_or_path in adapter_config.json",
    )


def _recorded_base(folder: Path) -> str | None:
    try:
        found = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    base = found.get("base_model_name_or_path") if isinstance(found, dict) else None
    return base if isinstance(base, str) and base else None
