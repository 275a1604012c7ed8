"""Does a checkpoint fit its own configuration? From headers alone, before a worker is started or a weight is read.

transformers loads what it can: it drops tensors that the architecture has no place for and draws those that are missing
at random, both with no more than a line in a log. Here its own loading code goes through the files' names and shapes
on the meta device, with its renamings, its tied weights and the leftovers of old checkpoints that it knows, and
whatever does not match one to one is refused.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers.utils import logging

from distributed_unlearn.config import ModelConfig, RmuConfig
from distributed_unlearn.curvature.segments import find_segments
from distributed_unlearn.errors import ConfigError, ModelError
from distributed_unlearn.models.adapters import insert_adapter
from distributed_unlearn.models.base_of_adapter import opened_as
from distributed_unlearn.models.checkpoint import load_model_config, require_safetensors
from distributed_unlearn.models.families import family_of
from distributed_unlearn.models.family import ModelFamily, build
from distributed_unlearn.models.stored import FLOAT_DTYPES, StoredTensor, stored_tensors
from distributed_unlearn.models.trainable import trainable_parameters


def check_checkpoint(config: ModelConfig, zero_stage: int) -> None:
    """Refuse what cannot be opened at a ZeRO stage, as far as configuration and headers tell.

    Raises:
        ModelError: no checkpoint of the family, tensors that do not fit the configuration, an adapter that does not fit
            the model, a pattern of `trainable` without a match, no segments at stage 3.
    """
    config = opened_as(config)
    require_safetensors(config.path)
    check_tensors(config)
    family = family_of(config.task)
    model = empty_model(family, load_model_config(config))
    inserted = insert_adapter(model, config)
    trainable_parameters(model, family, config.trainable, inserted)
    refuse_one_segment(find_segments(model, family.blocks(model), family.constants).fallback_reason, zero_stage)


def check_layer(config: ModelConfig, solver: RmuConfig) -> int:
    """The layer that RMU steers, of a checkpoint that `check_checkpoint` let pass.

    Raises:
        ModelError: a model without layers that can be told apart.
        ConfigError: a layer that it does not have.
    """
    config = opened_as(config)
    family = family_of(config.task)
    model = empty_model(family, load_model_config(config))
    segmented = find_segments(model, family.blocks(model), family.constants)
    if segmented.fallback_reason is not None:
        raise ModelError(
            f"solver.method rmu and a model whose layers cannot be told apart ({segmented.fallback_reason})",
            "a language model that is a list of layers, each with one hidden state",
            "choose another method",
        )
    layer = solver.layer_of(len(segmented.blocks))
    if layer >= len(segmented.blocks):
        last = len(segmented.blocks) - 1
        raise ConfigError(f"solver.layer {layer}", f"a layer from 0 to {last}", "lower solver.layer")
    return layer


def empty_model(family: ModelFamily, hf_config: Any) -> Any:
    """The architecture on the meta device, weights tied as they will be.

    Raises:
        ModelError: a configuration that the family cannot build a model from.
    """
    try:
        with init_empty_weights():
            model: Any = build(family, copy.deepcopy(hf_config))
        model.tie_weights()
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RuntimeError, ImportError) as error:
        raise ModelError(
            f"a config.json of type '{getattr(hf_config, 'model_type', '?')}' that no model can be built from "
            f"({type(error).__name__})",
            f"the configuration of a {family.kind}",
            "check config.json and model.task; copy the checkpoint again",
        ) from error
    return model


def refuse_one_segment(reason: str | None, zero_stage: int) -> None:
    """Refuse, at stage 3, a model that cannot be cut into segments, for the `reason`.

    Raises:
        ModelError: then.
    """
    if reason is not None and zero_stage == 3:
        raise ModelError(
            f"a model that cannot be cut into segments ({reason}) at ZeRO stage 3",
            "blocks that can be gathered one at a time",
            "set cluster.zero_stage to 0, 1 or 2, where the whole model is one segment",
        )


def check_tensors(config: ModelConfig) -> bool:
    """Refuse files whose tensors do not match the configuration one to one.

    Returns:
        False where the files of a hub model are not on this machine yet, so that nothing was checked.

    Raises:
        ModelError: tensors without a place, missing, of another shape or not floating-point; a quantised checkpoint.
    """
    family, hf_config = family_of(config.task), load_model_config(config)
    _refuse_quantised(config, hf_config)
    stored = stored_tensors(config)
    if not stored:
        return False
    empty = empty_model(family, hf_config)
    _refuse_integers(config, empty, stored)
    found = _load_empty(config, family, hf_config, type(empty), stored)
    held = {name for name, _ in empty.named_buffers()}
    foreign = sorted(key for key in found["unexpected_keys"] if key not in held)
    wrong = sorted(str(key[0]) for key in found["mismatched_keys"])
    missing = sorted(found["missing_keys"])
    if foreign or wrong or missing:
        raise _misfit(config, hf_config, foreign, wrong, missing)
    return True


def _load_empty(
    config: ModelConfig, family: ModelFamily, hf_config: Any, architecture: Any, stored: dict[str, StoredTensor]
) -> dict[str, Any]:
    """What transformers finds when it loads tensors of these names and shapes."""
    values = {
        key: torch.empty(tensor.shape, dtype=FLOAT_DTYPES.get(tensor.dtype, torch.int64), device="meta")
        for key, tensor in stored.items()
    }
    try:
        with _silence():
            _, found = architecture.from_pretrained(
                None,
                config=copy.deepcopy(hf_config),
                state_dict=values,
                device_map={"": "meta"},
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **family.arguments,
            )
    except RuntimeError as error:  # its renamings join tensors (experts) of which one is missing or misshapen
        raise ModelError(
            f"model '{config.path}', whose files lack a part of a weight that is made of several tensors",
            f"exactly the weights of the '{hf_config.model_type}' that config.json describes",
            "copy or convert the checkpoint again",
        ) from error
    result: dict[str, Any] = found
    return result


@contextmanager
def _silence() -> Iterator[None]:
    """What transformers reports here is said by our own errors."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _misfit(
    config: ModelConfig, hf_config: Any, foreign: list[str], wrong: list[str], missing: list[str]
) -> ModelError:
    parts = [
        f"{what} {len(names)} weights ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in (("lack", missing), ("have another shape for", wrong), ("hold besides", foreign))
        if names
    ]
    remedy = "copy or convert the checkpoint again"
    if any("lora_" in key for key in foreign):
        remedy = "merge the adapter into the weights, or give it as model.adapter"
    return ModelError(
        f"model '{config.path}', whose files {' and '.join(parts)}",
        f"exactly the weights of the '{hf_config.model_type}' that config.json describes",
        remedy,
    )


def _refuse_quantised(config: ModelConfig, hf_config: Any) -> None:
    settings = getattr(hf_config, "quantization_config", None)
    if settings is None:
        return
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    raise ModelError(
        f"model '{config.path}', which is quantised ({getattr(method, 'value', method) or 'unknown method'})",
        "weights in float32, bfloat16 or float16: quantised ones have no gradient",
        "use the checkpoint that it was quantised from",
    )


def _refuse_integers(config: ModelConfig, empty: Any, stored: dict[str, StoredTensor]) -> None:
    parameters = {name for name, _ in empty.named_parameters()}
    other = sorted(
        key
        for key, tensor in stored.items()
        if tensor.dtype not in FLOAT_DTYPES and (key in parameters or key.endswith(".weight"))
    )
    if other:
        raise ModelError(
            f"model '{config.path}' with {len(other)} weights stored as {stored[other[0]].dtype}, e.g. {other[0]}",
            "weights in float32, bfloat16 or float16",
            "use a checkpoint that is not quantised",
        )
