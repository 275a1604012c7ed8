"""Load a checkpoint straight into ZeRO partitions, and own the weights as flat shards.

Stage 3 partitions with `deepspeed.zero.Init` from inside `from_pretrained`, without a DeepSpeed optimiser.
The partitions are then moved into one flat buffer a rank, of which DeepSpeed's `ds_tensor`s become views:
DeepSpeed's own gather sees every update, a segment is gathered by one collective, and an update is one local
axpy. Stages 0 to 2 replicate the weights (they differ in optimiser state, which there is none of); vectors
are partitioned in the same layout at every stage.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import deepspeed
import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError
from torch import nn
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

from distributed_unlearn.config import ModelConfig
from distributed_unlearn.errors import ModelError
from distributed_unlearn.models.adapters import InsertedAdapter, initial_weights, insert_adapter
from distributed_unlearn.models.base_of_adapter import opened_as
from distributed_unlearn.models.checkpoint import load_model_config
from distributed_unlearn.models.families import family_of
from distributed_unlearn.models.family import build
from distributed_unlearn.models.fit import check_tensors
from distributed_unlearn.models.saved_names import forget_unused_conversions


def prepare_deepspeed(use_gpu: bool) -> None:
    """Let DeepSpeed adopt the existing process group, without compiling its CPU shared-memory extension.

    The extension serves inference only, takes a compiler and about 20 s, and a killed build leaves a lock
    that hangs every later start.
    """
    if not use_gpu:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(torch.distributed.get_backend(), verbose=False)


def _deepspeed_config(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
        # DeepSpeed's linear function has no forward-mode rule and would replace torch's for the whole process.
        "zero_optimization": {"stage": 3, "memory_efficient_linear": False, "stage3_param_persistence_threshold": 0},
    }


@contextmanager
def _partitioned_loading(config: dict[str, Any]) -> Iterator[None]:
    keep_alive = HfDeepSpeedConfig(config)  # transformers holds it by a weak reference
    fans = torch.nn.init._calculate_fan_in_and_fan_out

    def fans_of_partition(tensor: torch.Tensor) -> tuple[int, int]:
        # An architecture may ask for them although the weight is loaded (ResNet does); a placeholder has no shape.
        return fans(tensor.new_zeros(()).expand(getattr(tensor, "ds_shape", tensor.shape)))

    torch.nn.init._calculate_fan_in_and_fan_out = fans_of_partition
    try:
        yield
    finally:
        torch.nn.init._calculate_fan_in_and_fan_out = fans
        del keep_alive
        unset_hf_deepspeed_config()


def _refuse_missing(path: str, found: dict[str, Any]) -> None:
    # transformers draws missing weights at random, differently on every rank, and says so in a log alone.
    missing = sorted(found["missing_keys"])
    if missing:
        raise ModelError(
            f"model '{path}', whose files lack {len(missing)} weights ({', '.join(missing[:3])}, ...)",
            "every weight of the architecture that config.json names",
            "copy or convert the checkpoint again",
        )


def load_model(
    config: ModelConfig,
    dtype: torch.dtype,
    zero_stage: int,
    device: torch.device,
    adapter_dtype: torch.dtype = torch.float32,
) -> tuple[nn.Module, InsertedAdapter | None]:
    """The checkpoint as its family opens it, in `eval()` mode, and its adapter. All ranks must call this.

    Partitioned at stage 3; the base's weights are in `dtype`, an adapter's in `adapter_dtype`.

    Safetensors only; remote code is never run.

    Raises:
        ModelError: no such checkpoint, not safetensors, files that are damaged or lack weights, or an architecture
            that transformers cannot load.
    """
    config = opened_as(config)
    family, path = family_of(config.task), config.path
    arguments: dict[str, Any] = {
        **family.arguments,
        "config": load_model_config(config),
        "revision": config.revision,
        "use_safetensors": True,
        "trust_remote_code": False,
        "dtype": dtype,
        "output_loading_info": True,
    }
    checked = check_tensors(config)
    try:
        if zero_stage == 3:
            with _partitioned_loading(_deepspeed_config(dtype)):
                loaded: Any = family.auto_class.from_pretrained(path, **arguments)
        else:
            loaded = family.auto_class.from_pretrained(path, **arguments)
            nn.Module.to(loaded[0], device)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(
            f"model '{path}', which cannot be loaded ({str(error).splitlines()[0]})",
            f"a Hugging Face {family.kind} with intact safetensors weights",
            "check the path and the files; convert pytorch_model.bin with save_pretrained(safe_serialization=True)",
        ) from error
    model, found = loaded
    _refuse_missing(path, found)
    forget_unused_conversions(model)
    model.gradient_checkpointing_disable()
    if not checked:  # a hub model, whose files were not here before
        check_tensors(config)
    inserted = insert_adapter(model, config)
    if inserted is not None:
        _set_adapter(model, inserted, initial_weights(model, inserted, config), adapter_dtype, zero_stage, device)
    assert torch.nn.functional.linear.__module__ == "torch._C._nn", "DeepSpeed replaced torch's linear function"
    gc.collect()
    return cast(nn.Module, model.eval()), inserted


def _set_adapter(
    model: nn.Module,
    inserted: InsertedAdapter,
    values: dict[str, torch.Tensor],
    dtype: torch.dtype,
    zero_stage: int,
    device: torch.device,
) -> None:
    """Give the adapter its weights and partition it like the rest. All ranks must call this."""
    for name, parameter in model.named_parameters():
        if name in inserted.names:
            parameter.data = values[name].to(device, dtype)
    if zero_stage == 3:
        deepspeed.zero.Init(module=model, config_dict_or_path=_deepspeed_config(dtype), dtype=dtype)


def build_buffers_exactly(model: nn.Module, config: ModelConfig) -> None:
    """Give a model that was loaded in a lower precision the buffers that it would have in float32.

    Rotary frequencies, scales and the like are computed in the dtype of loading; those of the files are theirs.
    """
    family = family_of(config.task)
    hf_config = load_model_config(config)
    with init_empty_weights(include_buffers=False):
        hf_config.dtype = torch.float32
        exact = build(family, hf_config)
    for name, module in exact.named_modules():
        own = model.get_submodule(name)
        own = getattr(own, "base_layer", own)
        for key in module._non_persistent_buffers_set:
            buffer, held = module._buffers[key], own._buffers[key]
            if buffer is not None and held is not None:
                own._buffers[key] = buffer.to(held.device)


def full_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Full shape of every parameter by qualified name, partitioned or not."""
    return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in model.named_parameters()}


def checkpoint_dtype(config: ModelConfig) -> torch.dtype:
    """The dtype that the checkpoint's own config names; float32 where it names none."""
    named = getattr(load_model_config(config), "dtype", None)
    return named if isinstance(named, torch.dtype) else torch.float32
