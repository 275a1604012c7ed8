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
from dataclasses import dataclass
from typing import Any, cast

import deepspeed
import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

from distributed_unlearn.curvature.layout import FlatLayout, SegmentLayout, Slot, shard_of, unpack
from distributed_unlearn.engine.communicator import Communicator
from distributed_unlearn.errors import ModelError


def prepare_deepspeed(use_gpu: bool) -> None:
    """Let DeepSpeed adopt the existing process group, without compiling its CPU shared-memory extension.

    The extension serves inference only, takes a compiler and about 20 s, and a killed build leaves a lock
    that hangs every later start.
    """
    if not use_gpu:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("nccl" if use_gpu else "gloo", verbose=False)


def _deepspeed_config(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": dtype == torch.bfloat16},
        # DeepSpeed's linear function has no forward-mode rule and would replace torch's for the whole process.
        "zero_optimization": {"stage": 3, "memory_efficient_linear": False, "stage3_param_persistence_threshold": 0},
    }


@contextmanager
def _partitioned_loading(config: dict[str, Any]) -> Iterator[None]:
    keep_alive = HfDeepSpeedConfig(config)  # transformers holds it by a weak reference
    try:
        yield
    finally:
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


def load_model(path: str, revision: str | None, dtype: torch.dtype, zero_stage: int, device: torch.device) -> nn.Module:
    """A causal LM in `eval()` mode with eager attention; partitioned at stage 3. All ranks must call this.

    Safetensors only; remote code is never run.

    Raises:
        ModelError: no such checkpoint, not safetensors, files that are damaged or lack weights, or an architecture
            that transformers cannot load.
    """
    arguments: dict[str, Any] = {
        "revision": revision,
        "use_safetensors": True,
        "trust_remote_code": False,
        "attn_implementation": "eager",
        "dtype": dtype,
        "output_loading_info": True,
    }
    try:
        if zero_stage == 3:
            with _partitioned_loading(_deepspeed_config(dtype)):
                loaded: Any = AutoModelForCausalLM.from_pretrained(path, **arguments)
        else:
            loaded = AutoModelForCausalLM.from_pretrained(path, **arguments)
            nn.Module.to(loaded[0], device)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(
            f"model '{path}', which cannot be loaded ({str(error).splitlines()[0]})",
            "a Hugging Face causal language model with intact safetensors weights",
            "check the path and the files; convert pytorch_model.bin with save_pretrained(safe_serialization=True)",
        ) from error
    model, found = loaded
    _refuse_missing(path, found)
    model.gradient_checkpointing_disable()
    assert torch.nn.functional.linear.__module__ == "torch._C._nn", "DeepSpeed replaced torch's linear function"
    gc.collect()
    return cast(nn.Module, model.eval())


def full_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Full shape of every parameter by qualified name, partitioned or not."""
    return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in model.named_parameters()}


def checkpoint_dtype(path: str, revision: str | None) -> torch.dtype:
    """The dtype that the checkpoint's own config names; float32 where it names none."""
    config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
    named = getattr(config, "dtype", None)
    return named if isinstance(named, torch.dtype) else torch.float32


class ShardedWeights:
    """The weights of one rank: an fp32 master shard of what is trainable, and what the forward pass gathers.

    Args:
        model: as `load_model` returned it.
        layout: the flat layout of its parameters for this world size.
        communicator: the group.
        compute_dtype: dtype of gathered weights; float64 is for checks.
        partitioned: True at ZeRO stage 3.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: FlatLayout,
        communicator: Communicator,
        compute_dtype: torch.dtype,
        partitioned: bool,
    ) -> None:
        self._layout, self._communicator = layout, communicator
        self._dtype, self._partitioned = compute_dtype, partitioned
        # `Any`: DeepSpeed adds ds_tensor and the like to parameters.
        self._parameters: dict[str, Any] = dict(model.named_parameters())
        master_dtype = torch.float64 if compute_dtype == torch.float64 else torch.float32
        self.master = self._collect(trainable=True, dtype=master_dtype)
        """This rank's trainable weights: [vector_numel], fp32 (float64 in checks), padding zero."""
        self._compute = self.master if compute_dtype == master_dtype else self.master.to(compute_dtype)
        self._frozen = self._collect(trainable=False, dtype=compute_dtype)
        # As loaded, on the host: what an update does not touch must leave as it came.
        self._exact_frozen = (
            self._frozen if compute_dtype == master_dtype else self._collect(trainable=False, dtype=master_dtype).cpu()
        )
        if partitioned:
            self._adopt_partitions()

    def _slots(self, trainable: bool) -> Iterator[tuple[int, Slot]]:
        for segment in self._layout.segments:
            start = segment.start if trainable else segment.frozen_start
            for slot in segment.trainable if trainable else segment.frozen:
                yield start + slot.offset, slot

    def _collect(self, trainable: bool, dtype: torch.dtype) -> torch.Tensor:
        size = self._layout.vector_numel if trainable else self._layout.frozen_numel
        flat = torch.zeros(size, dtype=dtype, device=self._communicator.device)
        for begin, slot in self._slots(trainable):
            parameter = self._parameters[slot.qualified_name]
            if self._partitioned:
                count = slot.local_numel(self._communicator.rank)
                assert parameter.ds_tensor.numel() == slot.shard_numel, "DeepSpeed partitions differently"
                flat[begin : begin + count] = parameter.ds_tensor[:count].to(dtype)  # its padding is not initialised
            else:
                flat[begin : begin + slot.shard_numel] = shard_of(
                    parameter.detach(), slot, self._communicator.rank, dtype
                )
        return flat

    def _adopt_partitions(self) -> None:
        for flat, trainable in ((self._compute, True), (self._frozen, False)):
            for begin, slot in self._slots(trainable):
                self._parameters[slot.qualified_name].ds_tensor.data = flat[begin : begin + slot.shard_numel]

    def segment_weights(self, segment: SegmentLayout) -> dict[str, torch.Tensor]:
        """Full weights of a segment in the compute dtype. All ranks must call this."""
        if not self._partitioned:
            return {
                slot.name: self._parameters[slot.qualified_name].detach().to(self._dtype)
                for slot in (*segment.trainable, *segment.frozen)
            }
        return self._gather(segment, self._compute, self._frozen)

    def exact_segment_weights(self, segment: SegmentLayout) -> dict[str, torch.Tensor]:
        """Full weights of a segment at the master's precision. All ranks must call this."""
        return self._gather(segment, self.master, self._exact_frozen)

    def _gather(self, segment: SegmentLayout, trainable: torch.Tensor, frozen: torch.Tensor) -> dict[str, torch.Tensor]:
        full: dict[str, torch.Tensor] = {}
        for flat, slots, start, stop in (
            (trainable, segment.trainable, segment.start, segment.stop),
            (frozen, segment.frozen, segment.frozen_start, segment.frozen_stop),
        ):
            if slots:
                local = flat[start:stop].to(self._communicator.device)
                full.update(unpack(self._communicator.all_gather(local), slots, self._layout.world_size))
        return full

    def set_master(self, master: torch.Tensor) -> None:
        """Overwrite the weights by a vector in the master's layout. All ranks must call this."""
        self.master.copy_(master)
        self.refresh()

    def refresh(self) -> None:
        """Bring what the forward pass uses up to the master. All ranks must call this."""
        if self._compute is not self.master:
            self._compute.copy_(self.master)
        if self._partitioned:
            return
        for segment in self._layout.segments:
            if segment.trainable:
                gathered = self._communicator.all_gather(self._compute[segment.start : segment.stop])
                for slot in segment.trainable:
                    full = unpack(gathered, (slot,), self._layout.world_size)[slot.name]
                    self._parameters[slot.qualified_name].data.copy_(full)

    def gather_master(self, segment: SegmentLayout, slot: Slot) -> torch.Tensor:
        """One full parameter at the master's precision. All ranks must call this."""
        flat, start = (self.master, segment.start) if slot.trainable else (self._exact_frozen, segment.frozen_start)
        begin = start + slot.offset
        local = flat[begin : begin + slot.shard_numel].to(self._communicator.device)
        gathered = self._communicator.all_gather(local)
        return gathered[: slot.numel].view(slot.shape)


@dataclass(frozen=True)
class ExactWeights:
    """The weights at the master's precision, as a `WeightSource`."""

    weights: ShardedWeights

    def segment_weights(self, segment: SegmentLayout) -> dict[str, torch.Tensor]:
        """Full parameters by name within the segment. All ranks must call this."""
        return self.weights.exact_segment_weights(segment)
