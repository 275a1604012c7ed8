"""From a job's model and data sections to an encoded corpus and its partition, without touching the weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from distributed_unlearn.config import DataConfig, ModelConfig, SelectionConfig
from distributed_unlearn.data.corpus import load_records
from distributed_unlearn.data.encoding import EncodedCorpus, EncodingReport, encode_records, join
from distributed_unlearn.data.selection import Partition, partition_records, read_ids
from distributed_unlearn.errors import ConfigError, ModelError


@dataclass(frozen=True, eq=False)
class PreparedData:
    """Everything a job needs of its records."""

    corpus: EncodedCorpus
    partition: Partition
    report: EncodingReport


def load_model_config(config: ModelConfig) -> Any:
    """The checkpoint's Hugging Face configuration.

    Raises:
        ModelError: no such folder or hub model.
    """
    try:
        return AutoConfig.from_pretrained(config.path, revision=config.revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model.path '{config.path}' without a readable config.json ({type(error).__name__})",
            "a folder with a Hugging Face checkpoint, or a hub name that this machine can reach",
            "check the path",
        ) from error


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer; it must be a fast one, whose offsets tell prompt from answer.

    Raises:
        ModelError: missing, not fast, or without a pad token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.path, revision=config.revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model.path '{config.path}' without a readable tokenizer ({type(error).__name__})",
            "tokenizer files beside the weights",
            "save the tokenizer into the checkpoint's folder",
        ) from error
    if not tokenizer.is_fast:
        raise ModelError("a slow tokenizer", "a fast one (tokenizer.json)", "convert it with transformers")
    if tokenizer.pad_token_id is None:
        raise ModelError(
            f"the tokenizer of '{config.path}', which has no pad token",
            "a pad token (it may be the end-of-sequence token)",
            "set pad_token in the checkpoint's tokenizer_config.json",
        )
    return tokenizer


def context_length(hf_config: Any, limit: int | None) -> int:
    """Tokens per record: the model's context, or the user's lower limit.

    Raises:
        ConfigError: a limit beyond the context.
    """
    context = int(getattr(hf_config, "max_position_embeddings", 0) or 0)
    if limit is not None and context and limit > context:
        raise ConfigError(f"data.max_length {limit}", f"at most the model's {context}", "lower data.max_length")
    return limit or context or 1 << 30


def prepare_data(
    model: ModelConfig,
    data: DataConfig,
    forget: Sequence[SelectionConfig],
    holdout: SelectionConfig | None,
) -> PreparedData:
    """Load, tokenise and partition the records.

    Raises:
        ModelError, DataError, ConfigError: see the parts.
    """
    length = context_length(load_model_config(model), data.max_length)
    tokenizer = load_tokenizer(model)
    records = load_records(data)
    subjects = {name for selection in forget for name in selection.subjects}
    named = {name for selection in forget for name in (*selection.record_ids, *read_ids(selection.ids_file))}
    protected = frozenset(r.record_id for r in records if r.subject_id in subjects or r.record_id in named)
    corpus, report = encode_records(records, tokenizer, length, data.too_long, protected)
    num_main = corpus.num_records
    if holdout is not None and holdout.path is not None:
        extra = load_records(data.model_copy(update={"path": holdout.path}))
        held, _ = encode_records(extra, tokenizer, length, data.too_long, frozenset())
        corpus = join((corpus, held))
    return PreparedData(corpus, partition_records(corpus, forget, holdout, num_main), report)
