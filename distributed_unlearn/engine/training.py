"""Fine-tuning inside the workers: accelerate drives DeepSpeed's optimiser-partitioning engine.

The loss of a step is the token mean over the *global* minibatch. DeepSpeed averages gradients over ranks and
over accumulation steps, so each local share is multiplied by both counts before `backward`.

The model trains in `eval()` mode. What depends on chance or on which records share a micro-batch is off: dropout,
layer drop, a router's noise, batch statistics. With any of it on, a result would depend on the number of ranks and
on the micro-batch, and a retrained reference would differ from the trained model by more than the records left out.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.state import AcceleratorState
from torch import nn
from torch.nn import functional
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from distributed_unlearn.config import TrainingSettings
from distributed_unlearn.curvature.head import rows_before_head
from distributed_unlearn.data.batches import Corpus
from distributed_unlearn.data.sampling import cut, draw, micro_batches, num_micro_batches
from distributed_unlearn.engine.communicator import Communicator
from distributed_unlearn.engine.optimizer import AdamW, parameter_groups
from distributed_unlearn.errors import NumericalError
from distributed_unlearn.models.families import family_of
from distributed_unlearn.models.family import refuse_half_statistics
from distributed_unlearn.workers.messages import Indices, TrainingPlan, TrainingSpec


def plan_training(config: TrainingSettings, num_records: int, world_size: int, micro_batch_size: int) -> TrainingPlan:
    """Steps and accumulation of `config.epochs` passes over `num_records`; the last step of an epoch may be smaller."""
    batch = min(config.batch_size, num_records)
    accumulation = num_micro_batches(batch, world_size, micro_batch_size)
    return TrainingPlan(config.epochs * math.ceil(num_records / batch), batch, accumulation, micro_batch_size)


def records_of_step(seed: int, step_index: int, indices: Indices, batch_size: int) -> Indices:
    """The records of one optimiser step: an epoch is one permutation of all, cut into batches; the last takes the rest.

    So every record is seen exactly once an epoch. Depends on neither ranks nor micro-batches.
    """
    epoch, position = divmod(step_index, math.ceil(len(indices) / batch_size))
    everything = draw(seed, 0, epoch, "train", indices, len(indices))
    return everything[position * batch_size : (position + 1) * batch_size]


def left_out(hf_config: Any) -> tuple[str, ...]:
    """What a model's configuration asks for and training leaves out, as `name rate`: dropout, layer drop, jitter."""
    settings = sorted(hf_config.to_dict().items())
    chance = [(name, rate) for name, rate in settings if ("drop" in name or "jitter" in name) and type(rate) is float]
    return tuple(f"{name} {rate:g}" for name, rate in chance if rate > 0)


def warmup_then_cosine(step: int, num_steps: int, warmup_share: float) -> float:
    """Factor on the learning rate: linear from 0 to 1, then half a cosine down to 0."""
    warmup = max(1, round(num_steps * warmup_share))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))


class Trainer:
    """AdamW under DeepSpeed ZeRO on the parameters that require gradients. All ranks must call every method."""

    def __init__(
        self,
        model: nn.Module,
        corpus: Corpus,
        spec: TrainingSpec,
        communicator: Communicator,
    ) -> None:
        config = spec.train
        self._corpus, self._indices, self._config = corpus, spec.indices, config
        self._communicator, self._seed = communicator, spec.seed
        self._constants = family_of(spec.model.task).constants
        plan = plan_training(config, len(spec.indices), communicator.world_size, spec.micro_batch_size)
        self.plan = replace(plan, left_out=left_out(model.config))
        refuse_half_statistics(model, next(model.parameters()).dtype)
        bf16 = next(model.parameters()).dtype == torch.bfloat16
        plugin = DeepSpeedPlugin(hf_ds_config=self._deepspeed_config(spec.zero_stage, bf16))
        # accelerate keeps the first plugin of a process for good; a second training needs a clean state.
        # (`cpu=True` would make it use DistributedDataParallel instead of DeepSpeed.)
        AcceleratorState._reset_state(reset_partial_state=True)
        self._accelerator = Accelerator(deepspeed_plugin=plugin)
        groups = parameter_groups(model, config.weight_decay)
        optimizer = AdamW(groups, config.learning_rate, communicator.rank)
        self._engine, self._optimizer = self._accelerator.prepare(model.eval(), optimizer)
        assert type(self._engine).__name__ == "DeepSpeedEngine", "accelerate did not choose DeepSpeed"
        self.model = model

    def _deepspeed_config(self, zero_stage: int, bf16: bool) -> dict[str, Any]:
        return {
            "train_micro_batch_size_per_gpu": self.plan.micro_batch_size,
            "gradient_accumulation_steps": self.plan.accumulation_steps,
            "gradient_clipping": self._config.max_gradient_norm,
            "bf16": {"enabled": bf16},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {
                # Stage 0 would round every update to bfloat16, without the fp32 weights that the others keep.
                "stage": max(zero_stage, 1) if bf16 else zero_stage,
                "memory_efficient_linear": False,
                "stage3_param_persistence_threshold": 0,
            },
        }

    def step(self, step_index: int) -> float:
        """One optimiser step; returns the token mean of the global minibatch's nll before it.

        Raises:
            NumericalError: the loss is not finite (on every rank); this step has changed no weight.
        """
        plan, communicator = self.plan, self._communicator
        chosen = records_of_step(self._seed, step_index, self._indices, plan.batch_size)
        num_tokens = int(self._corpus.num_answer_tokens(chosen).sum())
        mine = cut(chosen, communicator.rank, communicator.world_size)
        factor = warmup_then_cosine(step_index, plan.num_steps, self._config.warmup_share)
        for group in self._optimizer.param_groups:
            group["lr"] = self._config.learning_rate * factor
        scale = communicator.world_size * plan.accumulation_steps / num_tokens
        parts = micro_batches(mine, plan.micro_batch_size, plan.accumulation_steps)
        local = loss = 0.0
        for number, part in enumerate(parts):
            with self._accelerator.accumulate(self._engine):
                nll = self._sum_of_nll(part)
                local += float(nll.detach())
                if number == len(parts) - 1:  # the last backward pass is followed by the optimiser's step
                    loss = self._mean_loss(local, num_tokens, step_index)
                self._accelerator.backward(nll * scale)
                self._optimizer.step()
                self._optimizer.zero_grad()
        return loss

    def _sum_of_nll(self, indices: Indices) -> torch.Tensor:
        batch = self._corpus.batch(indices).to(self._communicator.device)
        dtype = next(self.model.parameters()).dtype
        inputs = {k: value.to(dtype) if value.is_floating_point() else value for k, value in batch.inputs.items()}
        with rows_before_head(self.model, batch.positions) as selection:
            logits = selection.rows(self._engine(**self._constants, **inputs).logits)
        return functional.cross_entropy(logits.float(), batch.labels, reduction="sum")

    def _mean_loss(self, local: float, num_tokens: int, step_index: int) -> float:
        total = self._communicator.all_reduce_sum(torch.tensor([local], dtype=torch.float64))
        loss = float(total[0]) / num_tokens
        if not math.isfinite(loss):
            raise NumericalError(
                f"a training loss of {loss} at step {step_index + 1}",
                "a finite loss",
                "lower the learning rate of the training or use float32; no checkpoint was written",
            )
        return loss

    def finish(self) -> nn.Module:
        """Detach DeepSpeed from the model and return it in `eval()` mode."""
        self._accelerator.free_memory()
        destroy: Callable[[], None] = getattr(self._engine, "destroy", lambda: None)
        destroy()
        # accelerate's plugin leaves transformers in ZeRO-3 mode: the next model would be loaded partitioned.
        unset_hf_deepspeed_config()
        return self.model.eval()
