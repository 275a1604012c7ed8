"""Causal language models: everything that `AutoModelForCausalLM` opens, and the text part of multimodal models."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from distributed_unlearn.curvature.segments import Blocks, no_split_blocks
from distributed_unlearn.models.family import ActivationSizes, CheckBatch, transformer_activations
from distributed_unlearn.models.processor import save_tokenizer


class CausalLM:
    """A decoder that predicts the next token."""

    kind = "causal language model"
    auto_class = AutoModelForCausalLM

    @property
    def arguments(self) -> dict[str, Any]:
        """Attention and experts as plain operations: fused kernels have no second derivative."""
        return {"attn_implementation": "eager", "experts_implementation": "eager"}

    @property
    def constants(self) -> dict[str, Any]:
        """No cache: a block is run more than once on the same input."""
        return {"use_cache": False}

    def part_config(self, hf_config: Any) -> Any:
        """The whole configuration."""
        return hf_config

    def blocks(self, model: nn.Module) -> Blocks:
        """The decoder's layers."""
        return no_split_blocks(model)

    def context_length(self, hf_config: Any) -> int | None:
        """`max_position_embeddings` of the text part."""
        return int(getattr(hf_config.get_text_config(), "max_position_embeddings", 0) or 0) or None

    def vocab_size(self, hf_config: Any) -> int | None:
        """Rows of the input embedding."""
        return int(getattr(hf_config.get_text_config(), "vocab_size", 0) or 0) or None

    def check_batch(self, hf_config: Any, batch_size: int, sequence_length: int, seed: int) -> CheckBatch:
        """Random tokens, padded on the right; the first quarter is a prompt, the rest is predicted."""
        generator = torch.Generator().manual_seed(seed)
        shape = (batch_size, sequence_length)
        ids = torch.randint(0, self.vocab_size(hf_config) or 2, shape, generator=generator)
        lengths = torch.randint(sequence_length // 2, sequence_length + 1, shape[:1], generator=generator)
        mask = torch.arange(sequence_length)[None, :] < lengths[:, None]
        # The logits at position t predict token t + 1; those at the last position predict nothing.
        labels = torch.full(shape, -100)
        first = max(1, sequence_length // 4)
        labels[:, first - 1 : -1] = torch.where(mask[:, first:], ids[:, first:], -100)
        return CheckBatch({"input_ids": ids, "attention_mask": mask.long()}, labels)

    def activation_sizes(self, hf_config: Any, micro_batch_size: int, record_size: int) -> ActivationSizes:
        """Of a transformer; logits at every position."""
        num_logits = micro_batch_size * record_size * (self.vocab_size(hf_config) or 0)
        return transformer_activations(hf_config.get_text_config(), micro_batch_size, record_size, num_logits)

    def save_processor(self, path: str, revision: str | None, folder: Path) -> None:
        """The tokenizer."""
        save_tokenizer(path, revision, folder)
