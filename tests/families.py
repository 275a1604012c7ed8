"""Tiny random models of five architectures and random batches, shared by the tests."""

from typing import NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

FAMILIES = ("llama", "qwen2", "mistral", "gemma", "gpt_neox")
VOCABULARY = 67


class RandomBatch(NamedTuple):
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    answer_mask: torch.Tensor

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}


def tiny_model(
    family: str, tied: bool | None = None, dtype: torch.dtype = torch.float32, seed: int = 0
) -> PreTrainedModel:
    """Two layers, width 32; `tied=None` keeps the architecture's own habit. Same weights in every dtype."""
    settings: dict[str, object] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        # Larger than usual, so that attention and activations are far from linear.
        "initializer_range": 0.15,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if family != "gpt_neox":
        settings["num_key_value_heads"] = 2
    if family in ("llama", "gemma"):
        settings["pad_token_id"] = 0
    if family == "gemma":
        settings["head_dim"] = 8
    if tied is not None:
        settings["tie_word_embeddings"] = tied
    config = AutoConfig.for_model(family, **settings)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                # Norm weights and biases start at constants, which would hide a mistake in their curvature.
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
                elif model.get_input_embeddings().weight is parameter and config.pad_token_id is not None:
                    # Checkpoints rarely have a zero row at the pad token.
                    parameter[config.pad_token_id].normal_(0, 0.15)
    return model.to(dtype).eval()


def random_batch(vocab: int, batch: int, length: int, seed: int, pad_share: float = 0.25) -> RandomBatch:
    """Random tokens, right padding with 0 on about `pad_share` of the positions, answers after random prompts.

    Token 0 occurs as an ordinary token as well (position 1), as it does where a checkpoint pads with its eos.
    The first record is never padded, so the batch really has `length` positions.
    """
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(0, vocab, (batch, length), generator=generator)
    input_ids[:, 1] = 0
    most = min(int(2 * pad_share * length), length - 4)
    padding = torch.randint(0, most + 1, (batch,), generator=generator)
    padding[0] = 0
    real = (length - padding).unsqueeze(1)
    prompt = (real * torch.empty(batch, 1).uniform_(0.25, 0.75, generator=generator)).long().clamp(min=2)
    position = torch.arange(length).unsqueeze(0)
    attention_mask = (position < real).long()
    return RandomBatch(input_ids * attention_mask, attention_mask, (position >= prompt) & (position < real))


def random_tangent(model: torch.nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """Standard normal entries for every trainable parameter, padding rows included."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def other_family(family: str, **settings: object) -> PreTrainedModel:
    """Two layers of another architecture, float64, eager attention."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(family, **sizes, **settings, initializer_range=0.15, bos_token_id=1, eos_token_id=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    return model.double().eval()
