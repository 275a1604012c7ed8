"""From a job's model and data sections to an encoded corpus and its partition, without touching the weights."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from distributed_unlearn.config import DataConfig, ModelConfig, SelectionConfig
from distributed_unlearn.data.batches import NamedCorpus
from distributed_unlearn.data.encoding import EncodingReport
from distributed_unlearn.data.erased import ErasedBefore, checkpoint_lineage, find_erased
from distributed_unlearn.data.selection import Partition, partition_records, read_ids
from distributed_unlearn.data.sources import Loaded, Named, source_for
from distributed_unlearn.errors import DataError
from distributed_unlearn.models.checkpoint import find_commit, load_model_config


@dataclass(frozen=True, eq=False)
class PreparedData:
    """Everything a job needs of its records."""

    corpus: NamedCorpus
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
    """Load, encode and partition the records.

    Raises:
        ModelError, DataError, ConfigError: see the parts.
    """
    commit = find_commit(model)
    model = model.model_copy(update={"revision": commit or model.revision})
    lineage = checkpoint_lineage(model, data.erased)
    source = source_for(model, load_model_config(model), data)
    separate = None
    if holdout is not None and holdout.path is not None:
        columns = data.columns if holdout.path.lower().endswith(".csv") else None
        place = {"path": holdout.path, "name": holdout.name, "split": holdout.split or "train", "columns": columns}
        separate = data.model_copy(update=place)
    loaded = source.load(data, separate, Named.by(forget))
    if holdout is not None:
        _refuse_dropped(holdout, loaded)
    erased = find_erased(lineage, data.erased, loaded.corpus)
    partition = partition_records(loaded.corpus, forget, holdout, loaded.num_main, erased.sets)
    return PreparedData(loaded.corpus, partition, loaded.report, commit, erased)


def _refuse_dropped(holdout: SelectionConfig, loaded: Loaded) -> None:
    """Refuse a holdout record that is named and was dropped; later it would pass for an id that does not exist."""
    named = {*holdout.record_ids, *read_ids(holdout.ids_file)}
    left = frozenset(loaded.corpus.subject_ids[: loaded.num_main])
    gone = [record.record_id for record in loaded.dropped if record.record_id in named]
    gone += [record.record_id for record in loaded.dropped if record.subject_id in {*holdout.subjects} - left]
    if gone:
        raise DataError(
            f"{len(gone)} record(s) to be held out that are longer than {loaded.limit} tokens and were dropped, "
            f"e.g. {', '.join(map(repr, gone[:5]))}",
            "every record that is named in the data",
            "raise data.max_length, set data.too_long to truncate, or take them out of holdout",
        )
