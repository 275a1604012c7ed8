"""Records as tokens: one flat array for all of them, where each answer begins, and right-padded batches."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from distributed_unlearn.data.batches import PredictionBatch
from distributed_unlearn.data.corpus import TextRecord
from distributed_unlearn.data.lengths import Encoded, check_too_long, some_ids
from distributed_unlearn.data.packed import PackedTokens, join_packed, pack
from distributed_unlearn.errors import DataError, ModelError

RECORDS_PER_CALL = 1024
"""Records tokenised at once: bounds the memory of the offsets, which are far larger than the tokens."""


@dataclass(frozen=True, eq=False)
class TokenCorpus(PackedTokens):
    """All records' tokens in one array, cheap to share without copies through an object store; a `Corpus`.

    Record `i` owns `tokens[offsets[i]:offsets[i + 1]]`; its first `prompt_lengths[i]` tokens are given, the rest
    is predicted. `prompt_lengths[i] >= 1` always, since nothing predicts a first token.
    """

    tokens: np.ndarray
    """int32 [num_tokens]."""
    offsets: np.ndarray
    """int64 [num_records + 1]."""
    prompt_lengths: np.ndarray
    """int32 [num_records]."""
    pad_token_id: int

    def __post_init__(self) -> None:
        assert len(self.offsets) == len(self.prompt_lengths) + 1 and self.offsets[-1] == len(self.tokens)

    def num_answer_tokens(self, indices: np.ndarray) -> np.ndarray:
        """Predicted tokens per record, at least 1: int64, the shape of `indices`."""
        return self.lengths(indices) - self.prompt_lengths[indices]

    def batch(self, indices: np.ndarray) -> PredictionBatch:
        """See `Corpus.batch`."""
        return collate(self, indices).predictions()


@dataclass(frozen=True, eq=False)
class EncodedCorpus(TokenCorpus):
    """The driver's corpus: tokens, and whose they are."""

    record_ids: tuple[str, ...]
    subject_ids: tuple[str | None, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        assert self.num_records == len(self.record_ids) == len(self.subject_ids)

    def without_ids(self) -> TokenCorpus:
        """What workers need: they never read an id, and so are sent none."""
        return TokenCorpus(self.tokens, self.offsets, self.prompt_lengths, self.pad_token_id)


@dataclass(frozen=True)
class EncodingReport:
    """What encoding did to the records."""

    num_records: int
    """Records kept."""
    num_truncated: int
    num_dropped: int
    longest: int
    """Size of the largest record, before truncation or dropping."""
    unit: Literal["tokens", "pixels a side"] = "tokens"
    """Of `longest`."""


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """Right-padded records. `B` records, `T` positions."""

    input_ids: torch.Tensor
    """int64 [B, T]."""
    attention_mask: torch.Tensor
    """int64 [B, T]; from the lengths, so a pad token inside a record stays visible."""
    answer_mask: torch.Tensor
    """bool [B, T]; True at the positions `t >= 1` whose token is to be predicted from position `t - 1`."""

    def predictions(self) -> PredictionBatch:
        """The same as model inputs, and the positions, labels and records of the answer tokens in row order."""
        wanted = self.answer_mask.clone()
        wanted[:, 0] = False
        record, position = wanted.nonzero(as_tuple=True)
        return PredictionBatch(
            inputs={"input_ids": self.input_ids, "attention_mask": self.attention_mask},
            positions=record * wanted.shape[1] + position - 1,
            labels=self.input_ids[record, position],
            record=record,
            num_rows=len(wanted),
        )


def encode_records(
    records: Sequence[TextRecord],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    too_long: Literal["refuse", "truncate", "drop"],
    protected_ids: frozenset[str],
) -> tuple[EncodedCorpus, EncodingReport]:
    """Tokenise all records and find where each answer begins.

    Prompt, one space and answer are tokenised in one call, as a model meets them; the answer's first token is the
    first whose span of characters ends beyond the prompt, so a token merged across the border is predicted.
    The tokenizer's own special tokens are added; its end-of-sequence token is appended where it has one and did
    not add it itself. Chat records are rendered by the tokenizer's template, which brings its own special tokens.

    Args:
        records: All chat, or none chat; order is kept.
        tokenizer: A fast tokenizer with a pad token.
        max_length: Tokens per record, prompt and answer together.
        too_long: `refuse` raises, `drop` leaves the record out, `truncate` cuts the answer's end; of a classification
            it cuts the text's end, never the label.
        protected_ids: Records that `drop` must not drop, i.e. those to be forgotten.

    Returns:
        The corpus and a report of counts.

    Raises:
        ModelError: no pad token, a tokenizer without character offsets, or an unusable chat template.
        DataError: a record too long and not allowed to be, a record without any answer token, no record left.
    """
    pad_token_id = _pad_token(tokenizer)
    encoded: list[Encoded] = []
    for start in range(0, len(records), RECORDS_PER_CALL):
        encoded.extend(_tokenise(records[start : start + RECORDS_PER_CALL], tokenizer))
    longest = max((len(item.token_ids) for item in encoded), default=0)
    _refuse_empty_answers(records, encoded)
    long = [index for index, item in enumerate(encoded) if len(item.token_ids) > max_length]
    if too_long == "truncate":
        for index in long:
            encoded[index] = _shorten(records[index], encoded[index], tokenizer, max_length)
    if long:
        check_too_long(records, encoded, long, max_length, too_long, protected_ids)
    dropped = frozenset(long) if too_long == "drop" else frozenset()
    kept = [index for index in range(len(records)) if index not in dropped]
    if not kept:
        raise DataError(f"no record left of {len(records)}", "at least one", "raise data.max_length or add records")
    tokens, offsets = pack([encoded[index].token_ids[:max_length] for index in kept])
    corpus = EncodedCorpus(
        tokens=tokens,
        offsets=offsets,
        prompt_lengths=np.array([encoded[index].prompt_length for index in kept], dtype=np.int32),
        record_ids=tuple(records[index].record_id for index in kept),
        subject_ids=tuple(records[index].subject_id for index in kept),
        pad_token_id=pad_token_id,
    )
    num_truncated = len(long) if too_long == "truncate" else 0
    return corpus, EncodingReport(len(kept), num_truncated, len(dropped), longest)


def join(corpora: Sequence[EncodedCorpus]) -> EncodedCorpus:
    """Concatenate corpora of one tokenizer, e.g. the training records and a separate holdout file.

    Raises:
        DataError: an id that occurs in more than one of them.
    """
    counts = Counter(record_id for corpus in corpora for record_id in corpus.record_ids)
    repeated = [record_id for record_id, count in counts.items() if count > 1]
    if repeated:
        raise DataError(
            f"{len(repeated)} record id(s) that occur in more than one file, e.g. {some_ids(repeated)}",
            "ids that are unique over all files",
            "give the holdout file an id column with ids of its own",
        )
    tokens, offsets = join_packed(corpora)
    return EncodedCorpus(
        tokens=tokens,
        offsets=offsets,
        prompt_lengths=np.concatenate([corpus.prompt_lengths for corpus in corpora]),
        record_ids=tuple(record_id for corpus in corpora for record_id in corpus.record_ids),
        subject_ids=tuple(subject_id for corpus in corpora for subject_id in corpus.subject_ids),
        pad_token_id=corpora[0].pad_token_id,
    )


def collate(corpus: TokenCorpus, indices: np.ndarray, pad_to_multiple: int = 8) -> TokenBatch:
    """Records padded on the right, and which of their tokens are predicted; see `PackedTokens.padded`.

    Args:
        corpus: The tokens.
        indices: int [B], which records, in this order. Empty: one row of padding that predicts nothing and
            attends to its first position.
        pad_to_multiple: See `PackedTokens.padded`.

    Returns:
        `TokenBatch` on the CPU.
    """
    indices = np.asarray(indices, dtype=np.int64)
    input_ids, lengths = corpus.padded(indices, pad_to_multiple)
    prompt_lengths = corpus.prompt_lengths[indices] if len(indices) else np.array([1])
    positions = np.arange(input_ids.shape[1])
    inside = positions < lengths[:, None]
    return TokenBatch(
        input_ids=torch.from_numpy(input_ids),
        attention_mask=torch.from_numpy(inside.astype(np.int64)),
        answer_mask=torch.from_numpy(inside & (positions >= prompt_lengths[:, None])),
    )


def _pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.pad_token_id is None:
        raise ModelError(
            "a tokenizer without a pad token",
            "a pad token",
            "set data.pad_token, or pad_token in the checkpoint's tokenizer_config.json, e.g. to its end of sequence",
        )
    if not tokenizer.is_fast:
        raise ModelError(
            "a tokenizer without character offsets", "a fast tokenizer", "add its tokenizer.json to the checkpoint"
        )
    return int(tokenizer.pad_token_id)


def _tokenise(records: Sequence[TextRecord], tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    chat = records[0].messages is not None
    assert all((record.messages is not None) == chat for record in records), "chat and other records mixed"
    rendered = [_render_chat(record, tokenizer) if chat else _render(record) for record in records]
    output = tokenizer(
        [text for text, _ in rendered],
        add_special_tokens=not chat,
        return_offsets_mapping=True,
        return_attention_mask=False,
        padding=False,
        truncation=False,
        verbose=False,
    )
    end_token = None if chat else tokenizer.eos_token_id
    encoded = []
    for token_ids, spans, (_, num_prompt_characters) in zip(
        output["input_ids"], output["offset_mapping"], rendered, strict=True
    ):
        ends_beyond = (position for position, span in enumerate(spans) if span[1] > num_prompt_characters)
        first_answer = next(ends_beyond, len(token_ids))
        if end_token is not None and token_ids and token_ids[-1] != end_token:
            token_ids = [*token_ids, end_token]
        encoded.append(Encoded(token_ids, max(first_answer, 1)))
    return encoded


def _shorten(record: TextRecord, whole: Encoded, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoded:
    """A classification with as much of its text as fits beside the label; `whole` where nothing may be cut, or all."""
    if record.shortenable is None:
        return whole
    start, end = record.shortenable
    fitting, low, high = whole, 0, end - start - 1
    while low <= high:  # the number of tokens grows with the number of characters
        kept = (low + high) // 2
        shorter = replace(record, prompt=record.prompt[: start + kept] + record.prompt[end:])
        (item,) = _tokenise([shorter], tokenizer)
        if len(item.token_ids) <= max_length:
            fitting, low = item, kept + 1
        else:
            high = kept - 1
    return fitting


def _render(record: TextRecord) -> tuple[str, int]:
    """The whole text of a record, and how many of its characters are the prompt."""
    spaced = not record.prompt or record.prompt[-1].isspace() or record.answer[:1].isspace()
    return record.prompt + ("" if spaced else " ") + record.answer, len(record.prompt)


def _render_chat(record: TextRecord, tokenizer: PreTrainedTokenizerBase) -> tuple[str, int]:
    assert record.messages is not None
    if tokenizer.chat_template is None:
        raise ModelError(
            "chat records and a tokenizer without a chat template",
            "a chat template",
            "add one to the checkpoint, or use data.format question_answer",
        )
    messages = list(record.messages)
    try:
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise DataError(
            f"record '{record.record_id}', whose messages the chat template refuses ({type(error).__name__})",
            "the roles, in the order, that the template knows",
            "correct or remove the record",
        ) from None
    assert isinstance(whole, str) and isinstance(prompt, str)
    if not whole.startswith(prompt):
        raise ModelError(
            f"a chat template that renders the messages before the answer differently once the answer follows "
            f"(record '{record.record_id}')",
            "a conversation that begins with its own generation prompt",
            "use a chat template without such additions, or data.format question_answer",
        )
    if record.answer.strip() not in whole[len(prompt) :]:
        raise ModelError(
            f"a chat template that leaves out the answer (record '{record.record_id}')",
            "a conversation that ends with the assistant's own words",
            "use a chat template that renders them, or data.format question_answer",
        )
    return whole, len(prompt)


def _refuse_empty_answers(records: Sequence[TextRecord], encoded: Sequence[Encoded]) -> None:
    # The text is looked at too: a blank answer would otherwise pass as a lone end-of-sequence token.
    empty = [
        record.record_id
        for record, item in zip(records, encoded, strict=True)
        if not record.answer.strip() or item.prompt_length >= len(item.token_ids)
    ]
    if empty:
        raise DataError(
            f"{len(empty)} record(s) without a token to predict, e.g. {some_ids(empty)}",
            "an answer in every record (text: two tokens at least)",
            "complete or remove these records",
        )
