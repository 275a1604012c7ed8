"""Causal language models: everything that `AutoModelForCausalLM` opens, and the text part of multimodal models."""

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from distributed_unlearn.curvature.segments import Blocks, no_split_blocks
from distributed_unlearn.models.family import ActivationSizes, CheckBatch, transformer_activations
from distributed_unlearn.models.text_model import TextModel, random_tokens


class CausalLM(TextModel):
    """A decoder that predicts the next token."""

    kind = "causal language model"
    auto_class = AutoModelForCausalLM

    def blocks(self, model: nn.Module) -> Blocks:
        """The decoder's layers."""
        return no_split_blocks(model)

    def check_batch(self, hf_config: Any, batch_size: int, sequence_length: int, seed: int) -> CheckBatch:
        """Random tokens, padded on the right; the first quarter is a prompt, the rest is predicted."""
        generator = torch.Generator().manual_seed(seed)
        ids, mask = random_tokens(self.vocab_size(hf_config) or 2, batch_size, sequence_length, generator)
        # The logits at position t predict token t + 1; those at the last position predict nothing.
        labels = torch.full(ids.shape, -100)
        first = max(1, sequence_length // 4)
        labels[:, first - 1 : -1] = torch.where(mask[:, first:], ids[:, first:], -100)
        return CheckBatch({"input_ids": ids, "attention_mask": mask.long()}, labels)

    def activation_sizes(self, hf_config: Any, micro_batch_size: int, record_size: int) -> ActivationSizes:
        """Of a transformer; logits at every position."""
        num_logits = micro_batch_size * record_size * (self.vocab_size(hf_config) or 0)
        return transformer_activations(hf_config.get_text_config(), micro_batch_size, record_size, num_logits)
