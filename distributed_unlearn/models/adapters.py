"""LoRA adapters through peft: inserted into a model, drawn from a seed or read from a folder, written or merged.

A LoRA layer computes `W x + (alpha / rank) B A x` with A [rank, in] and B [out, rank] (Hu et al. 2022, section 4.1).
The base's W is frozen, A and B are what is trained and unlearned. Without dropout, whatever a folder says: a gradient
and a product must see the same function.
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners import lora
from safetensors.torch import load_file
from torch import Tensor, nn

from distributed_unlearn.config import AdapterFolder, LoraAdapter, ModelConfig
from distributed_unlearn.errors import ModelError
from distributed_unlearn.files import expand_home
from distributed_unlearn.models.base_of_adapter import ADAPTER_CONFIG, refuse_other_base
from distributed_unlearn.models.saved_names import SavedGroup, WholeCheckpoint
from distributed_unlearn.models.stored import read_headers

ADAPTER_WEIGHTS = "adapter_model.safetensors"
_NAME = "default"
_UNSUPPORTED = {
    "bias": "none",
    "use_dora": False,
    "lora_bias": False,
    "modules_to_save": None,
    "layer_replication": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "alora_invocation_tokens": None,
    "use_qalora": False,
}
"""Settings of peft with the one value that is understood here; others change the function or train base weights."""

_CHANGING_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Beginnings of `init_lora_weights` under which the adapter belongs to a base that peft changes when it inserts it."""


@dataclass(frozen=True)
class InsertedAdapter:
    """An adapter in a model."""

    settings: peft.LoraConfig
    names: frozenset[str]
    """Qualified names of its weights."""


def insert_adapter(model: nn.Module, config: ModelConfig) -> InsertedAdapter | None:
    """Put the adapter of `config` into the model, with weights that mean nothing yet; None where it has none.

    Raises:
        ModelError: see `insert_layers`; a folder without a usable adapter, or with one of another base.
    """
    adapter = config.adapter
    if adapter is None:
        return None
    settings = _new_settings(adapter) if isinstance(adapter, LoraAdapter) else _read_settings(adapter, config)
    settings.base_model_name_or_path, settings.revision = _absolute(config.path), config.revision
    return insert_layers(model, settings)


def insert_layers(model: nn.Module, settings: peft.LoraConfig) -> InsertedAdapter:
    """Put LoRA layers into a model, which may be partitioned or on the meta device, and freeze the rest.

    Raises:
        ModelError: target modules that match nothing or are no linear layers of their own.
    """
    _refuse_unmatched(model, settings)
    tied = _tied_weights(model)
    try:
        peft.inject_adapter_in_model(settings, model, _NAME)
    except ValueError as error:
        raise ModelError(
            f"an adapter that cannot be put into the model ({str(error).splitlines()[0]})",
            "linear layers that this architecture has",
            "correct model.adapter",
        ) from error
    layers = dict(_layers(model))
    for name, layer in layers.items():
        if type(layer) is not lora.Linear or id(layer.get_base_layer().weight) in tied:
            raise ModelError(
                f"model.adapter on '{name}', which is no linear layer of its own",
                "linear layers whose weight belongs to them alone",
                "take it out of model.adapter.target_modules",
            )
    names = {f"{name}.{part}.{_NAME}.weight" for name in layers for part in ("lora_A", "lora_B")}
    return InsertedAdapter(settings, frozenset(names))


def initial_weights(model: nn.Module, inserted: InsertedAdapter, config: ModelConfig) -> dict[str, Tensor]:
    """The adapter's full weights by qualified name, the same on every rank: fp32, CPU.

    A folder's own; else A uniform on +-1 / sqrt(in), a function of the seed alone, and B zero, so that the model
    computes what its base does.

    Raises:
        ModelError: a folder whose tensors do not belong to this model.
    """
    shapes = {name: _shape(parameter) for name, parameter in model.named_parameters() if name in inserted.names}
    if isinstance(config.adapter, AdapterFolder):
        return _read_weights(Path(expand_home(config.adapter.path)), shapes)
    assert config.adapter is not None
    generator = torch.Generator().manual_seed(config.adapter.seed)
    values = {}
    for name, shape in shapes.items():
        if ".lora_B." in name:
            values[name] = torch.zeros(shape)
        else:
            values[name] = (2 * torch.rand(shape, generator=generator) - 1) / shape[1] ** 0.5
    return values


class AdapterFiles:
    """The adapter alone, as `peft.PeftModel.from_pretrained` reads it."""

    stem = "adapter_model"

    def __init__(self, inserted: InsertedAdapter, shapes: Mapping[str, tuple[int, ...]]) -> None:
        chosen = {name: shape for name, shape in shapes.items() if name in inserted.names}
        self.groups = tuple(SavedGroup((name,), {_key(name): shape}) for name, shape in chosen.items())
        self._settings = inserted.settings

    def write_settings(self, folder: Path) -> None:
        """Write adapter_config.json."""
        settings = copy.copy(self._settings)
        settings.inference_mode = True
        settings.save_pretrained(str(folder))

    def tensors(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `SavedForm`."""
        return {_key(name): value for name, value in values.items()}

    def buffers(self) -> dict[str, Tensor]:
        """None: they are the base's."""
        return {}


class MergedCheckpoint:
    """The base with `W + (alpha / rank) B A` in the place of W, under the names of the base."""

    stem = "model"

    def __init__(self, model: nn.Module, inserted: InsertedAdapter, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._base_names = {name: _base_name(name) for name in shapes if name not in inserted.names}
        self._layers = {f"{name}.weight": (name, layer) for name, layer in _layers(model)}
        base = {self._base_names[name]: shape for name, shape in shapes.items() if name not in inserted.names}
        self._whole = WholeCheckpoint(model, base)
        own = {base_name: name for name, base_name in self._base_names.items()}
        self.groups = tuple(
            SavedGroup(tuple(member for name in group.members for member in self._members(name, own)), group.shapes)
            for group in self._whole.groups
        )

    def _members(self, base_name: str, own: Mapping[str, str]) -> Iterator[str]:
        yield own[base_name]
        if base_name in self._layers:
            module, _ = self._layers[base_name]
            yield f"{module}.lora_A.{_NAME}.weight"
            yield f"{module}.lora_B.{_NAME}.weight"

    def tensors(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `SavedForm`."""
        merged = {}
        for name, value in values.items():
            base_name = self._base_names.get(name)
            if base_name is None:
                continue
            if base_name in self._layers:
                module, layer = self._layers[base_name]
                a, b = (values[f"{module}.lora_{part}.{_NAME}.weight"] for part in "AB")
                delta = layer.scaling[_NAME] * (b @ a)
                value = value + (delta.T if layer.fan_in_fan_out else delta)
            merged[base_name] = value
        return self._whole.tensors(merged)

    def buffers(self) -> dict[str, Tensor]:
        """The base's."""
        return {_base_name(key): value for key, value in self._whole.buffers().items()}


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if isinstance(module, lora.LoraLayer):
            yield name, module


def _key(name: str) -> str:
    return "base_model.model." + name.replace(f".{_NAME}.weight", ".weight")


def _base_name(name: str) -> str:
    return name.replace(".base_layer.", ".")


def _shape(parameter: Any) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _absolute(path: str) -> str:
    folder = Path(expand_home(path))
    return str(folder.resolve()) if folder.is_dir() else path


def _tied_weights(model: nn.Module) -> set[int]:
    seen: set[int] = set()
    tied: set[int] = set()
    for _, parameter in model.named_parameters(remove_duplicate=False):
        (tied if id(parameter) in seen else seen).add(id(parameter))
    return tied


def _new_settings(adapter: LoraAdapter) -> peft.LoraConfig:
    targets = adapter.target_modules if isinstance(adapter.target_modules, str) else list(adapter.target_modules)
    return peft.LoraConfig(r=adapter.rank, lora_alpha=adapter.alpha, target_modules=targets)  # type: ignore[arg-type]


def _refuse_unmatched(model: nn.Module, settings: peft.LoraConfig) -> None:
    targets = settings.target_modules
    if isinstance(targets, str) or targets is None:  # a pattern, or all linear layers: peft refuses one without a match
        return
    names = [name for name, _ in model.named_modules()]
    idle = sorted(target for target in targets if not any(n == target or n.endswith(f".{target}") for n in names))
    if idle:
        linear = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise ModelError(
            f"model.adapter.target_modules with {', '.join(map(repr, idle))}, which the model does not have",
            f"names of its linear layers: {', '.join(linear)}",
            "correct model.adapter.target_modules, or set them to all-linear",
        )


def _read_settings(adapter: AdapterFolder, config: ModelConfig) -> peft.LoraConfig:
    folder = Path(expand_home(adapter.path))
    if not (folder / ADAPTER_CONFIG).is_file():
        raise ModelError(
            f"model.adapter.path '{adapter.path}' without {ADAPTER_CONFIG}",
            "a folder that peft has written",
            "check the path",
        )
    try:
        settings = peft.PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise _unusable(adapter, f"{ADAPTER_CONFIG} cannot be read ({type(error).__name__})") from error
    if not isinstance(settings, peft.LoraConfig):
        raise _unusable(adapter, f"method is {getattr(settings, 'peft_type', None)}")
    for name, understood in _UNSUPPORTED.items():
        value = getattr(settings, name, understood)
        if value != understood and value:
            raise _unusable(adapter, f"{name} is {value!r}")
    initial = settings.init_lora_weights
    if isinstance(initial, str) and initial.startswith(_CHANGING_BASE):
        raise _unusable(adapter, f"init_lora_weights is {initial!r}, which changes the base's weights")
    refuse_other_base(settings.base_model_name_or_path, config.path, adapter.path)
    settings.inference_mode, settings.lora_dropout = False, 0.0
    return settings


def _unusable(adapter: AdapterFolder, what: str) -> ModelError:
    return ModelError(
        f"the adapter '{adapter.path}', whose {what}",
        "a plain LoRA adapter on linear layers",
        "train one with model.adapter: {name: lora, ...}",
    )


def _read_weights(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    path = folder / ADAPTER_WEIGHTS
    held = read_headers(path)
    wanted = {_key(name): name for name in shapes}
    absent, foreign = sorted(wanted.keys() - held.keys()), sorted(held.keys() - wanted.keys())
    wrong = sorted(key for key in wanted.keys() & held.keys() if held[key].shape != shapes[wanted[key]])
    if absent or foreign or wrong:
        example = (absent or foreign or wrong)[0]
        raise ModelError(
            f"the adapter '{folder}', of whose tensors {len(absent)} are missing, {len(foreign)} belong to no target "
            f"module and {len(wrong)} have another shape, e.g. {example}",
            "the adapter of this very base model",
            "set model.path to the base that the adapter was trained on",
        )
    return {wanted[key]: value.float() for key, value in load_file(path).items()}
