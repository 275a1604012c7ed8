"""What causal language models and sequence classifiers share: transformers that read tokens."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distributed_unlearn.models.processor import save_tokenizer


class TextModel:
    """Members of a `ModelFamily` that reads tokens."""

    @property
    def arguments(self) -> dict[str, Any]:
        """Attention and experts as plain operations: fused kernels have no second derivative."""
        return {"attn_implementation": "eager", "experts_implementation": "eager"}

    @property
    def constants(self) -> dict[str, Any]:
        """No cache: a block is run more than once on the same input."""
        return {"use_cache": False}

    def idle(self, model: nn.Module) -> frozenset[str]:
        """What lies beside the text model inside a multimodal one: its vision tower and their connection."""
        decoder = getattr(model, "get_decoder", lambda: None)()
        path = next((name for name, module in model.named_modules() if module is decoder), "")
        around = path.rpartition(".")[0]
        if not around:  # the text model stands beside the head alone
            return frozenset()
        names = (name for name, _ in model.named_parameters() if name.startswith(f"{around}."))
        return frozenset(name for name in names if not name.startswith(f"{path}."))

    def context_length(self, hf_config: Any) -> int | None:
        """`max_position_embeddings` of the text part."""
        return int(getattr(hf_config.get_text_config(), "max_position_embeddings", 0) or 0) or None

    def vocab_size(self, hf_config: Any) -> int | None:
        """Rows of the input embedding."""
        return int(getattr(hf_config.get_text_config(), "vocab_size", 0) or 0) or None

    def save_processor(self, path: str, revision: str | None, folder: Path) -> None:
        """The tokenizer."""
        save_tokenizer(path, revision, folder)


def random_tokens(
    num_ids: int, batch_size: int, sequence_length: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Token ids, and which of them are no padding on the right: at least half of a record. Both [B, T]."""
    ids = torch.randint(0, num_ids, (batch_size, sequence_length), generator=generator)
    lengths = torch.randint(sequence_length // 2, sequence_length + 1, (batch_size,), generator=generator)
    return ids, torch.arange(sequence_length)[None, :] < lengths[:, None]
