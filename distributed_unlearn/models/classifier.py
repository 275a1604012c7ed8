"""Classifiers: one prediction a record, of a text or of an image."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

from distributed_unlearn.curvature.segments import Blocks, no_split_blocks
from distributed_unlearn.models.cnn import register_own_models
from distributed_unlearn.models.family import ActivationSizes, CheckBatch, build, transformer_activations
from distributed_unlearn.models.image_processor import save_image_processor
from distributed_unlearn.models.text_model import TextModel, random_tokens

_DEFAULT_CHECK_PIXELS = 32
"""Height and width of a check's images where the configuration names none."""


class SequenceClassifier(TextModel):
    """A transformer with a classification head; decoders read the class off the last token that is no padding."""

    kind = "sequence classifier"
    auto_class = AutoModelForSequenceClassification

    def blocks(self, model: nn.Module) -> Blocks:
        """The transformer's layers."""
        return layered_blocks(model)

    def check_batch(self, hf_config: Any, batch_size: int, sequence_length: int, seed: int) -> CheckBatch:
        """Random tokens, padded on the right, and random classes."""
        generator = torch.Generator().manual_seed(seed)
        pad = int(getattr(hf_config.get_text_config(), "pad_token_id", None) or 0)
        ids, mask = random_tokens(self.vocab_size(hf_config) or 2, batch_size, sequence_length, generator)
        classes = torch.randint(0, int(hf_config.num_labels), (batch_size,), generator=generator)
        return CheckBatch({"input_ids": torch.where(mask, ids, pad), "attention_mask": mask.long()}, classes)

    def activation_sizes(self, hf_config: Any, micro_batch_size: int, record_size: int) -> ActivationSizes:
        """Of a transformer."""
        num_logits = micro_batch_size * int(hf_config.num_labels)
        return transformer_activations(hf_config.get_text_config(), micro_batch_size, record_size, num_logits)


class ImageClassifier:
    """A network from images to classes, e.g. ResNet, ViT or the two-layer CNN of this package."""

    kind = "image classifier"

    @property
    def auto_class(self) -> Any:
        """Knows the models of this package too."""
        register_own_models()
        return AutoModelForImageClassification

    @property
    def arguments(self) -> dict[str, Any]:
        """Attention as plain operations: fused kernels have no second derivative."""
        return {"attn_implementation": "eager"}

    @property
    def constants(self) -> dict[str, Any]:
        """None."""
        return {}

    def idle(self, model: nn.Module) -> frozenset[str]:
        """Nothing."""
        return frozenset()

    def blocks(self, model: nn.Module) -> Blocks:
        """The network's layers, or those of its stages."""
        return layered_blocks(model)

    def context_length(self, hf_config: Any) -> int | None:
        """None."""
        return None

    def vocab_size(self, hf_config: Any) -> int | None:
        """None."""
        return None

    def check_batch(self, hf_config: Any, batch_size: int, sequence_length: int, seed: int) -> CheckBatch:
        """Images of standard normal pixels and random classes; `sequence_length` has no meaning here."""
        del sequence_length
        generator = torch.Generator().manual_seed(seed)
        size = getattr(hf_config, "image_size", None) or _DEFAULT_CHECK_PIXELS
        height, width = (size, size) if isinstance(size, int) else size
        shape = (batch_size, int(getattr(hf_config, "num_channels", 3)), int(height), int(width))
        pixels = torch.randn(shape, generator=generator)
        classes = torch.randint(0, int(hf_config.num_labels), shape[:1], generator=generator)
        return CheckBatch({"pixel_values": pixels}, classes)

    def activation_sizes(self, hf_config: Any, micro_batch_size: int, record_size: int) -> ActivationSizes:
        """Counted on a forward pass without numbers (on the meta device)."""
        with torch.device("meta"):
            model = build(self, hf_config).eval()
            shape = (micro_batch_size, int(getattr(hf_config, "num_channels", 3)), record_size, record_size)
            return _count_activations(model, dict(self.blocks(model).members), torch.zeros(shape))

    def save_processor(self, path: str, revision: str | None, folder: Path) -> None:
        """The image processor, where the checkpoint has one."""
        save_image_processor(path, revision, folder)


def _count_activations(model: nn.Module, blocks: dict[str, nn.Module], pixel_values: Tensor) -> ActivationSizes:
    inside, inputs = ["root"], [0]
    graphs = {name: 0 for name in ("root", *blocks)}

    def enter(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inside[0] = name
        inputs.append((args[0] if args else kwargs["hidden_states"]).numel())

    def leave() -> None:
        inside[0] = "root"

    def count(tensor: Tensor) -> Tensor:
        graphs[inside[0]] += 0 if isinstance(tensor, nn.Parameter) else tensor.numel()
        return tensor

    for name, block in blocks.items():
        block.register_forward_pre_hook(lambda _, *call, name=name: enter(name, *call), with_kwargs=True)
        block.register_forward_hook(lambda *_: leave())
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        logits = model(pixel_values=pixel_values).logits
    return ActivationSizes(max(inputs), max(graphs.values()), logits.numel())


def layered_blocks(model: nn.Module) -> Blocks:
    """What `_no_split_modules` names; else the members of the largest `ModuleList` that lies in no other.

    Members that hold all their parameters in one sequence of layers (the stages of a ResNet) are cut into these.
    """
    named = no_split_blocks(model)
    if named.absence is None:
        return named
    lists = [(name, part) for name, part in model.named_modules() if isinstance(part, nn.ModuleList) and len(part) > 1]
    outer = [(name, part) for name, part in lists if not any(name.startswith(f"{other}.") for other, _ in lists)]
    outer = [(name, part) for name, part in outer if not any(isinstance(member, nn.ModuleList) for member in part)]
    if not outer:
        return Blocks((), "no ModuleList of layers")
    name, members = max(outer, key=lambda item: _num_parameters(item[1]))
    return Blocks(tuple(block for index, member in enumerate(members) for block in _layers(f"{name}.{index}", member)))


def _layers(name: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers of a stage, or the module itself."""
    children = [(local, child) for local, child in module.named_children() if any(True for _ in child.parameters())]
    if len(children) != 1 or any(True for _ in module.parameters(recurse=False)):
        return [(name, module)]
    local, child = children[0]
    if not isinstance(child, nn.Sequential | nn.ModuleList):
        return [(name, module)]
    return [(f"{name}.{local}.{index}", layer) for index, layer in enumerate(child)]


def _num_parameters(module: nn.Module) -> int:
    # Under ZeRO-3 a parameter's own tensor is empty and its true size is in `ds_numel`.
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in module.parameters())
