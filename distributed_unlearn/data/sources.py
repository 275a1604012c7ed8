"""From a data section to a corpus, for each task: texts to go on with, texts with a class, images with a class."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, assert_never

import numpy as np
from transformers import PreTrainedTokenizerBase

from distributed_unlearn.config import DataConfig, ModelConfig, SelectionConfig
from distributed_unlearn.data.batches import NamedCorpus
from distributed_unlearn.data.classes import LabelledCorpus, Labels, class_names_of
from distributed_unlearn.data.corpus import TextRecord, load_records
from distributed_unlearn.data.encoding import EncodingReport, encode_records, join
from distributed_unlearn.data.images import ImageCorpus, load_images
from distributed_unlearn.data.selection import read_ids
from distributed_unlearn.data.text_classes import encode_texts, join_texts, load_labelled_texts
from distributed_unlearn.errors import DataError, ModelError
from distributed_unlearn.models.image_processor import ImagePreparation, load_image_preparation
from distributed_unlearn.models.processor import context_length, load_tokenizer


@dataclass(frozen=True)
class Named:
    """What selections name, before there is a corpus to look it up in."""

    subjects: frozenset[str]
    record_ids: frozenset[str]
    classes: frozenset[int | str]

    @classmethod
    def by(cls, selections: Sequence[SelectionConfig]) -> "Named":
        """Everything that some of the selections names.

        Raises:
            DataError: an ids file that cannot be read.
        """
        return cls(
            frozenset(name for selection in selections for name in selection.subjects),
            frozenset(name for s in selections for name in (*s.record_ids, *read_ids(s.ids_file))),
            frozenset(name for selection in selections for name in selection.classes),
        )

    def among(self, records: Sequence[TextRecord]) -> frozenset[str]:
        """Ids of the records that are named by subject or id."""
        return frozenset(
            record.record_id
            for record in records
            if record.subject_id in self.subjects or record.record_id in self.record_ids
        )


@dataclass(frozen=True, eq=False)
class Loaded:
    """A corpus: the training records, then those of a separate holdout file."""

    corpus: NamedCorpus
    num_main: int
    """Records that are not from the holdout file."""
    report: EncodingReport
    dropped: tuple[TextRecord, ...] = ()
    """Training records that were longer than `limit` and left out."""
    limit: int | None = None
    """Tokens of a record at most; None where records are no tokens."""


class Source(Protocol):
    """Reads the records of one task."""

    def load(self, data: DataConfig, holdout: DataConfig | None, named: Named) -> Loaded:
        """All records of `data`, and of `holdout` where it is a file of its own.

        Raises:
            DataError, ModelError: see the parts; a record of `named` that would be left out.
        """
        ...


def source_for(model: ModelConfig, hf_config: Any, data: DataConfig) -> Source:
    """The source of `model.task`.

    Raises:
        ModelError: a checkpoint without a usable tokenizer or image processor.
        ConfigError: data.max_length, data.pad_token or data.label_names that do not fit the checkpoint.
    """
    match model.task:
        case "causal_lm":
            length = context_length(hf_config, data.max_length)
            return CausalTexts(model, hf_config, load_tokenizer(model, data.pad_token), length)
        case "sequence_classification":
            tokenizer = load_tokenizer(model, data.pad_token)
            refuse_other_padding(model, hf_config, tokenizer)
            length = min(context_length(hf_config, data.max_length), int(tokenizer.model_max_length))
            return ClassTexts(model, hf_config, tokenizer, length, class_names_of(hf_config, data))
        case "image_classification":
            return ClassImages(load_image_preparation(model, hf_config), class_names_of(hf_config, data))
        case _:
            assert_never(model.task)


@dataclass(frozen=True, eq=False)
class CausalTexts:
    """Prompts with answers, for a causal language model."""

    model: ModelConfig
    hf_config: Any
    tokenizer: PreTrainedTokenizerBase
    length: int

    def load(self, data: DataConfig, holdout: DataConfig | None, named: Named) -> Loaded:
        """See `Source.load`."""
        records = load_records(data)
        corpus, report = encode_records(records, self.tokenizer, self.length, data.too_long, named.among(records))
        num_main, kept = corpus.num_records, frozenset(corpus.record_ids)
        dropped = tuple(record for record in records if record.record_id not in kept)
        if holdout is not None:
            extra = load_records(holdout, require_ids=False)
            refuse_known_texts(records, extra)
            held, held_report = encode_records(extra, self.tokenizer, self.length, data.too_long, frozenset())
            corpus, report = join((corpus, held)), _both(report, held_report)
        refuse_tokens_beyond(self.model, self.hf_config, corpus.tokens, corpus.pad_token_id)
        return Loaded(corpus, num_main, report, dropped, self.length)


@dataclass(frozen=True, eq=False)
class ClassTexts:
    """Texts with a class."""

    model: ModelConfig
    hf_config: Any
    tokenizer: PreTrainedTokenizerBase
    length: int
    class_names: tuple[str, ...]

    def load(self, data: DataConfig, holdout: DataConfig | None, named: Named) -> Loaded:
        """See `Source.load`."""
        records = load_labelled_texts(data)
        protected = named.among(records)
        if named.classes and data.too_long == "drop":
            protected |= {r.record_id for r in records}  # a class is to be forgotten whole
        corpus, labels, report = encode_texts(
            records, self.tokenizer, self.class_names, self.length, data.too_long, protected
        )
        num_main, kept = corpus.num_records, frozenset(labels.record_ids)
        dropped = tuple(record for record in records if record.record_id not in kept)
        if holdout is not None:
            extra = load_labelled_texts(holdout, require_ids=False)
            refuse_known_texts(records, extra)
            held, held_labels, held_report = encode_texts(
                extra, self.tokenizer, self.class_names, self.length, data.too_long, frozenset()
            )
            labels, report = Labels.join((labels, held_labels)), _both(report, held_report)
            corpus = join_texts((corpus, held))
        refuse_tokens_beyond(self.model, self.hf_config, corpus.tokens, corpus.pad_token_id)
        return Loaded(LabelledCorpus(corpus, labels), num_main, report, dropped, self.length)


@dataclass(frozen=True, eq=False)
class ClassImages:
    """Images with a class."""

    preparation: ImagePreparation
    class_names: tuple[str, ...]

    def load(self, data: DataConfig, holdout: DataConfig | None, named: Named) -> Loaded:
        """See `Source.load`; no image is ever left out."""
        values, labels = load_images(data, self.preparation, self.class_names)
        num_main = len(values)
        if holdout is not None:
            held, held_labels = load_images(holdout, self.preparation, self.class_names)
            labels, values = Labels.join((labels, held_labels)), np.concatenate([values, held])
        corpus = LabelledCorpus(ImageCorpus(values, labels.classes), labels)
        return Loaded(corpus, num_main, EncodingReport(len(values), 0, 0, max(values.shape[2:]), "pixels a side"))


def _both(first: EncodingReport, second: EncodingReport) -> EncodingReport:
    return EncodingReport(
        first.num_records + second.num_records,
        first.num_truncated + second.num_truncated,
        first.num_dropped + second.num_dropped,
        max(first.longest, second.longest),
        first.unit,
    )


def refuse_known_texts(records: Sequence[TextRecord], held_out: Sequence[TextRecord]) -> None:
    """Refuse a holdout file that repeats the training set: it would tell how hard *known* records are.

    Raises:
        DataError: it does.
    """

    def text(record: TextRecord) -> tuple[str, str, str]:
        return record.prompt, record.answer, repr(record.messages)

    known = {text(record) for record in records}
    same = [record.record_id for record in held_out if text(record) in known]
    if same:
        raise DataError(
            f"{len(same)} of {len(held_out)} record(s) of the holdout file whose text is in the training set too, "
            f"e.g. {', '.join(map(repr, same[:5]))}",
            "a holdout set that was never trained on",
            "take them out of the holdout file",
        )


def refuse_other_padding(model: ModelConfig, hf_config: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a classifier that would not know the padding: decoders find a text's last token by the pad token's id.

    Raises:
        ModelError: the configuration's pad token is another one, or it has none.
    """
    known = hf_config.get_text_config().pad_token_id
    if known != tokenizer.pad_token_id:
        raise ModelError(
            f"'{model.path}', whose configuration has pad_token_id {known} and whose records are padded with "
            f"{tokenizer.pad_token_id}",
            "one pad token: a classifier finds the end of a text by it",
            f"set pad_token_id to {tokenizer.pad_token_id} in its config.json, or data.pad_token to the token that it "
            "names",
        )


def refuse_tokens_beyond(model: ModelConfig, hf_config: Any, tokens: np.ndarray, pad_token_id: int) -> None:
    """Refuse tokens that the model has no embedding for: on a GPU they end the process with an assertion.

    Raises:
        ModelError: there are some.
    """
    size = int(getattr(hf_config.get_text_config(), "vocab_size", 0) or 0)
    largest = int(tokens.max())
    if not size or max(largest, pad_token_id) < size:
        return
    what = "pad token" if pad_token_id >= size else "tokens of the records"
    raise ModelError(
        f"a tokenizer of '{model.path}' whose {what} reach id {max(largest, pad_token_id)}",
        f"ids below the model's vocabulary size {size}",
        "set data.pad_token to a token that the model knows"
        if largest < size
        else "use the tokenizer that belongs to the checkpoint, or enlarge its embeddings",
    )
