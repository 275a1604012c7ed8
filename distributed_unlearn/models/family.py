"""What differs between kinds of models, in one protocol: opening, feeding, cutting into segments, and their sizes.

The engine, `plan` and the checks ask a `ModelFamily` and name no architecture. A new kind of model is a new class
with these members and one line in `families.py`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from distributed_unlearn.curvature.segments import Blocks
from distributed_unlearn.errors import ModelError


@dataclass(frozen=True)
class CheckBatch:
    """A random batch for numerical checks: what the forward takes, and what is predicted."""

    inputs: dict[str, Tensor]
    """Each [B, ...]; keyword arguments of the model's forward."""
    labels: Tensor
    """As the logits without their last dimension: the class that each should predict, -100 where none counts."""

    @property
    def num_labels(self) -> int:
        """Labels that count."""
        return int((self.labels != -100).sum())

    def rows(self, index: Tensor) -> "CheckBatch":
        """The rows `index` [n]; without any, the first row with no label that counts: ranks go through it together."""
        if len(index) == 0:
            first = self.rows(torch.zeros(1, dtype=torch.int64))
            return CheckBatch(first.inputs, torch.full_like(first.labels, -100))
        return CheckBatch({name: value[index] for name, value in self.inputs.items()}, self.labels[index])

    def to(self, device: torch.device) -> "CheckBatch":
        """The batch on `device`."""
        inputs = {name: value.to(device) for name, value in self.inputs.items()}
        return CheckBatch(inputs, self.labels.to(device))


@dataclass(frozen=True)
class ActivationSizes:
    """Elements that a forward pass of one micro-batch makes, for estimates of memory."""

    block_input: int
    """Largest input of a block."""
    block_graph: int
    """What the graph of the largest block keeps."""
    logits: int


class ModelFamily(Protocol):
    """One kind of model; without state. `hf_config` is the checkpoint's Hugging Face configuration."""

    @property
    def kind(self) -> str:
        """What it is, for messages: "causal language model"."""
        ...

    @property
    def auto_class(self) -> Any:
        """The transformers class whose `from_pretrained` and `from_config` open it."""
        ...

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of `from_pretrained` and of `from_config`, such as kernels that can be differentiated twice."""
        ...

    @property
    def constants(self) -> dict[str, Any]:
        """Keyword arguments of every forward call beside a batch's own."""
        ...

    def idle(self, model: nn.Module) -> frozenset[str]:
        """Qualified names of parameters that no prediction depends on: never changed, and saved as they were."""
        ...

    def blocks(self, model: nn.Module) -> Blocks:
        """The modules that become segments, or why there are none."""
        ...

    def context_length(self, hf_config: Any) -> int | None:
        """Tokens that a record may have; None where the notion does not exist or there is no limit."""
        ...

    def vocab_size(self, hf_config: Any) -> int | None:
        """Ids that may stand in a record; None where records are not tokens."""
        ...

    def check_batch(self, hf_config: Any, batch_size: int, sequence_length: int, seed: int) -> CheckBatch:
        """A random batch, a function of its arguments alone."""
        ...

    def activation_sizes(self, hf_config: Any, micro_batch_size: int, record_size: int) -> ActivationSizes:
        """Sizes for records of `record_size` tokens, or images of so many pixels a side."""
        ...

    def save_processor(self, path: str, revision: str | None, folder: Path) -> None:
        """Write what prepares the records of the checkpoint at `path` (its tokenizer, ...) into `folder`."""
        ...


def transformer_activations(
    hf_config: Any, micro_batch_size: int, sequence_length: int, num_logits: int
) -> ActivationSizes:
    """Sizes of a transformer's layer: about a dozen hidden states, four inner states and three attention maps."""
    tokens, hidden = micro_batch_size * sequence_length, int(hf_config.hidden_size)
    inner = int(getattr(hf_config, "intermediate_size", 4 * hidden) or 4 * hidden)
    heads = int(getattr(hf_config, "num_attention_heads", 1) or 1)
    graph = tokens * (12 * hidden + 4 * inner + 3 * heads * sequence_length)
    return ActivationSizes(tokens * hidden, graph, num_logits)


def batch_norms(model: nn.Module) -> list[nn.Module]:
    """The layers of batch normalisation.

    They use their running statistics, in training too, since models stay in `eval()` mode: statistics of a micro-batch
    would make results depend on the number of ranks, and statistics that follow the records hold a trace of them that
    no update of the weights can take away again.
    """
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def refuse_half_statistics(model: nn.Module, dtype: torch.dtype) -> None:
    """Refuse batch normalisation below float32: torch mixes its float32 statistics with no narrower weights.

    Raises:
        ModelError: there is some.
    """
    count = len(batch_norms(model))
    if count and dtype not in (torch.float32, torch.float64):
        raise ModelError(
            f"a model with {count} layer(s) of batch normalisation in {str(dtype).removeprefix('torch.')}",
            "float32, in which running statistics are kept",
            "set model.dtype to float32",
        )


def build(family: ModelFamily, hf_config: Any) -> nn.Module:
    """The architecture with random weights (without any under `accelerate.init_empty_weights`)."""
    model: nn.Module = family.auto_class.from_config(hf_config, **family.arguments)
    return model
