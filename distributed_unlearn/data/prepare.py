"""From a job's model and data sections to an encoded corpus and its partition, without touching the weights."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from distributed_unlearn.config import DataConfig, ModelConfig, SelectionConfig
from distributed_unlearn.data.corpus import TextRecord, load_records
from distributed_unlearn.data.encoding import EncodedCorpus, EncodingReport, encode_records, join
from distributed_unlearn.data.erased import ErasedBefore, checkpoint_lineage, find_erased
from distributed_unlearn.data.selection import Partition, partition_records, read_ids
from distributed_unlearn.errors import DataError, ModelError
from distributed_unlearn.models.checkpoint import find_commit, load_model_config
from distributed_unlearn.models.processor import context_length, load_tokenizer


@dataclass(frozen=True, eq=False)
class PreparedData:
    """Everything a job needs of its records."""

    corpus: EncodedCorpus
    partition: Partition
    report: EncodingReport
    """Of the training records and a separate holdout file together."""
    commit: str | None = None
    """What the model's hub name and revision stood for when the data was prepared; None for a folder."""
    erased: ErasedBefore = field(default_factory=ErasedBefore)
    """What earlier jobs erased from the model."""


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
    commit = find_commit(model)
    model = model.model_copy(update={"revision": commit or model.revision})
    lineage = checkpoint_lineage(model, data.erased)
    hf_config = load_model_config(model)
    length = context_length(hf_config, data.max_length)
    tokenizer = load_tokenizer(model, data.pad_token)
    records = load_records(data)
    subjects = {name for selection in forget for name in selection.subjects}
    named = {name for selection in forget for name in (*selection.record_ids, *read_ids(selection.ids_file))}
    protected = frozenset(r.record_id for r in records if r.subject_id in subjects or r.record_id in named)
    corpus, report = encode_records(records, tokenizer, length, data.too_long, protected)
    num_main = corpus.num_records
    if holdout is not None:
        _refuse_dropped(holdout, records, corpus, length)
    if holdout is not None and holdout.path is not None:
        source = {"path": holdout.path, "name": holdout.name, "split": holdout.split or "train"}
        extra = load_records(data.model_copy(update=source))
        held, held_report = encode_records(extra, tokenizer, length, data.too_long, frozenset())
        corpus, report = join((corpus, held)), _both(report, held_report)
    _refuse_tokens_beyond(model, hf_config, corpus)
    erased = find_erased(lineage, data.erased, corpus)
    partition = partition_records(corpus, forget, holdout, num_main, erased.sets)
    return PreparedData(corpus, partition, report, commit, erased)


def _both(first: EncodingReport, second: EncodingReport) -> EncodingReport:
    return EncodingReport(
        first.num_records + second.num_records,
        first.num_truncated + second.num_truncated,
        first.num_dropped + second.num_dropped,
        max(first.longest, second.longest),
    )


def _refuse_dropped(
    holdout: SelectionConfig, records: Sequence[TextRecord], corpus: EncodedCorpus, length: int
) -> None:
    """Refuse a holdout record that is named and was dropped; later it would pass for an id that does not exist."""
    kept = frozenset(corpus.record_ids)
    dropped = [record for record in records if record.record_id not in kept]
    named = {*holdout.record_ids, *read_ids(holdout.ids_file)}
    gone = [record.record_id for record in dropped if record.record_id in named]
    left = frozenset(corpus.subject_ids)
    gone += [record.record_id for record in dropped if record.subject_id in {*holdout.subjects} - left]
    if gone:
        raise DataError(
            f"{len(gone)} record(s) to be held out that are longer than {length} tokens and were dropped, "
            f"e.g. {', '.join(map(repr, gone[:5]))}",
            "every record that is named in the data",
            "raise data.max_length, set data.too_long to truncate, or take them out of holdout",
        )


def _refuse_tokens_beyond(model: ModelConfig, hf_config: Any, corpus: EncodedCorpus) -> None:
    """Refuse tokens that the model has no embedding for: on a GPU they end the process with an assertion."""
    size = int(getattr(hf_config.get_text_config(), "vocab_size", 0) or 0)
    largest = int(corpus.tokens.max())
    if not size or max(largest, corpus.pad_token_id) < size:
        return
    what = "pad token" if corpus.pad_token_id >= size else "tokens of the records"
    raise ModelError(
        f"a tokenizer of '{model.path}' whose {what} reach id {max(largest, corpus.pad_token_id)}",
        f"ids below the model's vocabulary size {size}",
        "set data.pad_token to a token that the model knows"
        if largest < size
        else "use the tokenizer that belongs to the checkpoint, or enlarge its embeddings",
    )
