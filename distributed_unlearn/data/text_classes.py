"""Texts with a class: what a sequence classifier is trained on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from distributed_unlearn.config import DataConfig
from distributed_unlearn.data.batches import PredictionBatch
from distributed_unlearn.data.classes import Labels, class_number
from distributed_unlearn.data.corpus import TextRecord, load_records
from distributed_unlearn.data.encoding import RECORDS_PER_CALL, EncodingReport
from distributed_unlearn.data.packed import PackedTokens, join_packed, pack
from distributed_unlearn.errors import DataError

PAD_TO_MULTIPLE = 8
"""Fewer distinct shapes; never changes a result, the padding being masked."""


@dataclass(frozen=True, eq=False)
class TextClassCorpus(PackedTokens):
    """Texts of a classifier as tokens, with their classes; a `Corpus`.

    Record `i` owns `tokens[offsets[i]:offsets[i + 1]]`.
    """

    tokens: np.ndarray
    """int32 [num_tokens]."""
    offsets: np.ndarray
    """int64 [num_records + 1]."""
    classes: np.ndarray
    """int64 [num_records]."""
    pad_token_id: int

    def __post_init__(self) -> None:
        assert len(self.offsets) == len(self.classes) + 1 and self.offsets[-1] == len(self.tokens)

    def num_answer_tokens(self, indices: np.ndarray) -> np.ndarray:
        """One prediction a record."""
        return np.ones(np.shape(indices), dtype=np.int64)

    def batch(self, indices: np.ndarray) -> PredictionBatch:
        """Records padded on the right; see `Corpus.batch`."""
        indices = np.asarray(indices, dtype=np.int64)
        input_ids, lengths = self.padded(indices, PAD_TO_MULTIPLE)
        mask = (np.arange(input_ids.shape[1]) < lengths[:, None]).astype(np.int64)
        rows = torch.arange(len(indices))
        return PredictionBatch(
            inputs={"input_ids": torch.from_numpy(input_ids), "attention_mask": torch.from_numpy(mask)},
            positions=rows,
            labels=torch.from_numpy(self.classes[indices]),
            record=rows,
            num_rows=len(lengths),
        )


def load_labelled_texts(config: DataConfig, require_ids: bool = True) -> list[TextRecord]:
    """The records of `config.path`: `prompt` is the text as it is, `answer` the label as the data spells it.

    Raises:
        DataError: see `load_records`.
    """
    plain = config.model_copy(update={"prompt_template": "{prompt}", "label_names": None})
    return load_records(plain, require_ids)


def encode_texts(
    records: Sequence[TextRecord],
    tokenizer: PreTrainedTokenizerBase,
    class_names: tuple[str, ...],
    max_length: int,
    too_long: Literal["refuse", "truncate", "drop"],
    protected_ids: frozenset[str],
) -> tuple[TextClassCorpus, Labels, EncodingReport]:
    """Tokenise texts, with the tokenizer's own special tokens, and look their classes up.

    Args:
        records: As `load_labelled_texts` gives them; order is kept.
        tokenizer: With a pad token.
        class_names: The model's classes.
        max_length: Tokens per record, special tokens included.
        too_long: `refuse` raises, `truncate` cuts the text's end, `drop` leaves the record out.
        protected_ids: Records that `drop` must not drop, i.e. those to be forgotten.

    Raises:
        DataError: an empty text, a label outside the classes, a record too long and not allowed to be, no record left.
    """
    encoded: list[list[int]] = []
    longest = num_truncated = 0
    for start in range(0, len(records), RECORDS_PER_CALL):
        texts = [record.prompt for record in records[start : start + RECORDS_PER_CALL]]
        whole = tokenizer(texts, verbose=False)["input_ids"]
        longest = max(longest, *(len(ids) for ids in whole))
        if too_long == "truncate":
            num_truncated += sum(len(ids) > max_length for ids in whole)
            whole = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]  # keeps a closing token
        encoded.extend(whole)
    _refuse_empty(records, encoded)
    kept = _kept(records, encoded, max_length, too_long, protected_ids)
    numbers = [class_number(records[i].answer, class_names, records[i].record_id) for i in kept]
    tokens, offsets = pack([encoded[i] for i in kept])
    corpus = TextClassCorpus(
        tokens=tokens,
        offsets=offsets,
        classes=np.array(numbers, dtype=np.int64),
        pad_token_id=int(tokenizer.pad_token_id),
    )
    labels = Labels(
        corpus.classes,
        tuple(records[i].record_id for i in kept),
        tuple(records[i].subject_id for i in kept),
        class_names,
    )
    return corpus, labels, EncodingReport(len(kept), num_truncated, len(records) - len(kept), longest)


def join_texts(corpora: Sequence[TextClassCorpus]) -> TextClassCorpus:
    """One after the other; all of one tokenizer."""
    tokens, offsets = join_packed(corpora)
    return TextClassCorpus(
        tokens=tokens,
        offsets=offsets,
        classes=np.concatenate([corpus.classes for corpus in corpora]),
        pad_token_id=corpora[0].pad_token_id,
    )


def _refuse_empty(records: Sequence[TextRecord], encoded: Sequence[list[int]]) -> None:
    empty = [r.record_id for r, ids in zip(records, encoded, strict=True) if not r.prompt.strip() or not ids]
    if empty:
        raise DataError(
            f"{len(empty)} record(s) without text, e.g. {_some(empty)}",
            "a text in every record",
            "complete or remove these records",
        )


def _kept(
    records: Sequence[TextRecord],
    encoded: Sequence[list[int]],
    max_length: int,
    too_long: Literal["refuse", "truncate", "drop"],
    protected_ids: frozenset[str],
) -> list[int]:
    """Which records stay; raises where the policy may not be applied."""
    long = [index for index, ids in enumerate(encoded) if len(ids) > max_length]
    names = [records[index].record_id for index in long]
    if long and too_long == "refuse":
        raise DataError(
            f"{len(long)} of {len(records)} records longer than {max_length} tokens, e.g. {_some(names)}",
            f"at most {max_length} tokens",
            "raise data.max_length (up to the model's context length), or set data.too_long to truncate, which cuts "
            "the text's end, or to drop, which leaves the records out unless they are to be forgotten",
        )
    wanted = [name for name in names if name in protected_ids]
    if wanted:
        raise DataError(
            f"{len(wanted)} record(s) to be forgotten that are longer than {max_length} tokens, e.g. {_some(wanted)}",
            "every record to be forgotten in the data",
            "raise data.max_length or set data.too_long to truncate",
        )
    dropped = frozenset(long)
    kept = [index for index in range(len(records)) if index not in dropped]
    if not kept:
        raise DataError(f"no record left of {len(records)}", "at least one", "raise data.max_length or add records")
    return kept


def _some(record_ids: Sequence[str]) -> str:
    return ", ".join(map(repr, record_ids[:5]))
