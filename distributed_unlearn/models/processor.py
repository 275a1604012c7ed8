"""The tokenizer of a checkpoint, fit for telling prompt from answer."""

import shutil
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import cached_file

from distributed_unlearn.config import ModelConfig
from distributed_unlearn.errors import ConfigError, ModelError
from distributed_unlearn.files import expand_home
from distributed_unlearn.models.base_of_adapter import opened_as
from distributed_unlearn.models.hub_errors import unreadable

_IMAGE_FILES = ("preprocessor_config.json", "processor_config.json")
Tokenizer = PreTrainedTokenizerBase
"""What `load_tokenizer` returns, for units that must not know transformers."""


def tokenizer_source(config: ModelConfig) -> ModelConfig:
    """Where the tokenizer is: an adapter folder without one has its base's."""
    return config if (Path(expand_home(config.path)) / "tokenizer_config.json").is_file() else opened_as(config)


def load_tokenizer(config: ModelConfig, pad_token: str | None = None) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer; it must be a fast one, whose offsets tell prompt from answer.

    Args:
        config: The checkpoint.
        pad_token: Pads instead of the tokenizer's own pad token; a token of its vocabulary.

    Raises:
        ModelError: missing, not fast, or without a pad token.
        ConfigError: a `pad_token` that the vocabulary does not hold.
    """
    config = tokenizer_source(config)
    path = expand_home(config.path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=config.revision, trust_remote_code=False)
    except Exception as error:  # of a file that is not what it should be transformers raises whatever comes up
        raise unreadable(config, "tokenizer", error) from error
    if not tokenizer.is_fast:
        raise ModelError("a slow tokenizer", "a fast one (tokenizer.json)", "convert it with transformers")
    if pad_token is not None:
        if pad_token not in tokenizer.get_vocab():
            raise ConfigError(
                f"data.pad_token '{pad_token}', which the tokenizer does not know",
                "a token of its vocabulary",
                f"name one that it has{_example(tokenizer)}",
            )
        tokenizer.pad_token = pad_token
    if tokenizer.pad_token_id is None:
        raise ModelError(
            f"the tokenizer of '{config.path}', which has no pad token",
            "a pad token (it may be the end-of-sequence token)",
            f"set data.pad_token{_example(tokenizer)}, or pad_token in the checkpoint's tokenizer_config.json",
        )
    return tokenizer


def save_tokenizer(path: str, revision: str | None, folder: Path) -> None:
    """Write the tokenizer of the checkpoint at `path` into `folder`, and how a multimodal one prepares its images."""
    AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False).save_pretrained(folder)
    for name in _IMAGE_FILES:
        found = cached_file(path, name, revision=revision, _raise_exceptions_for_missing_entries=False)
        if found is not None:
            shutil.copyfile(found, folder / name)


def _example(tokenizer: PreTrainedTokenizerBase) -> str:
    return "" if tokenizer.eos_token is None else f", e.g. to '{tokenizer.eos_token}'"


def context_length(hf_config: Any, limit: int | None) -> int:
    """Tokens per record: the model's context, or the user's lower limit.

    Raises:
        ConfigError: a limit beyond the context.
    """
    context = int(getattr(hf_config, "max_position_embeddings", 0) or 0)
    if limit is not None and context and limit > context:
        raise ConfigError(f"data.max_length {limit}", f"at most the model's {context}", "lower data.max_length")
    return limit or context or 1 << 30
