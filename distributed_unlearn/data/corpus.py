"""Reads training records: anything that `datasets` loads becomes a list of `TextRecord`.

No message here ever shows a record's text: ids, counts and column names only.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from distributed_unlearn.config import DataConfig
from distributed_unlearn.data.tables import Row, Table, open_rows
from distributed_unlearn.errors import ConfigError, DataError

_LONGEST_ID = 500
"""Characters; what is longer is no id but text, which no error and no log may show."""


@dataclass(frozen=True)
class TextRecord:
    """One training record before tokenisation."""

    record_id: str
    subject_id: str | None
    """Whose record it is; None when the data names nobody."""
    prompt: str
    """Text that is given, never predicted; empty for plain text and for chat."""
    answer: str
    """Text that is predicted."""
    messages: tuple[dict[str, str], ...] | None = None
    """Chat only: all messages, the last one the answer; the tokenizer's template renders them in `encoding`."""
    shortenable: tuple[int, int] | None = None
    """Classification only: which characters of the prompt, the text's, may be cut where a record is too long."""


def load_records(config: DataConfig, require_ids: bool = True) -> list[TextRecord]:
    """Read every record of `config.path`, in file order.

    Args:
        config: Where the records are, and which columns make prompt, answer, id and subject.
        require_ids: See `open_table`.

    Returns:
        One `TextRecord` per row. Ids are text; without an id column they are `row-0`, `row-1`, ...

    Raises:
        ConfigError: `prompt_template` without `{prompt}`.
        DataError: missing file, unreadable file, missing column, null or wrongly typed value, no rows,
            or an id that occurs twice.
    """
    if "{prompt}" not in config.prompt_template:
        raise ConfigError(
            "data.prompt_template without {prompt}", "a template that holds {prompt}", "write e.g. '{prompt}'"
        )
    with open_table(config, require_ids) as table:
        names = config.label_names
        if names is None and config.format == "classification":
            names = table.class_names(config.label_field)
        read = _reader(config, names)
        identify = identities(config, table)
        records = [read(row, identify(row, index)) for index, row in enumerate(table)]
    refuse_duplicates([record.record_id for record in records])
    return records


@dataclass(frozen=True)
class Identity:
    """What names a record."""

    record_id: str
    subject_id: str | None
    place: str = "the data"
    """File and line, for an error."""

    def __str__(self) -> str:
        return f"record '{self.record_id}' ({self.place})"


@contextmanager
def open_table(config: DataConfig, require_ids: bool = True) -> Iterator[Table]:
    """The rows of `config.path` with the columns that its format needs, for the length of the block.

    Args:
        config: Where the rows are and which columns they have.
        require_ids: Refuse data without the columns that the configuration itself names for ids and subjects: the
            number of a row proves nothing about whose record it was.

    Raises:
        DataError: missing file, unreadable file, missing column, or no rows.
    """
    with open_rows(config) as table:
        _require_columns(config, table, require_ids)
        yield table


def _needed_columns(config: DataConfig) -> tuple[str, ...]:
    return {
        "question_answer": (config.question_field, config.answer_field),
        "text": (config.text_field,),
        "chat": (config.messages_field,),
        "classification": (config.text_field, config.label_field),
        "image": (config.image_field, config.label_field),
    }[config.format]


def _require_columns(config: DataConfig, table: Table, require_ids: bool) -> None:
    needed = {name: "" for name in _needed_columns(config)}
    if require_ids:
        named = config.model_fields_set
        needed |= {config.id_field: " for the ids"} if "id_field" in named else {}
        if "subject_field" in named and config.subject_field is not None:
            needed[config.subject_field] = " for the subjects"
    names = set(table.column_names)
    missing = [name for name in needed if name not in names]
    if missing:
        raise DataError(
            f"no column {', '.join(repr(name) + needed[name] for name in missing)} in '{config.path}', which has "
            f"{table.describe_columns()}",
            f"the columns of format {config.format}, and those that data.id_field and data.subject_field name",
            "set data.format or the data.*_field that names the column; of a CSV file without a line of names, name "
            "them in data.columns",
        )


def identities(config: DataConfig, table: Table) -> Callable[[Row, int], Identity]:
    """What tells a row's id, and whose record it is.

    Where the data has no ids, a row's is `row-<number>`, its number among all rows of its source: the same in every
    slice of a split, so that a later job with another slice knows what an earlier one erased.

    The function raises:
        DataError: an empty id, or one that is neither text nor a whole number.
    """
    has_ids = config.id_field in table.column_names

    def identify(row: Row, index: int) -> Identity:
        place = table.place(index)
        record_id = f"row-{table.number(index)}"
        if has_ids:
            if row.get(config.id_field) in (None, ""):
                raise DataError(
                    f"no id in column '{config.id_field}', {place}", "an id in every row", "fill in the ids"
                )
            record_id = _as_id(row[config.id_field], config.id_field, place)
        subject = row.get(config.subject_field) if config.subject_field is not None else None
        if subject in (None, "") or config.subject_field is None:
            return Identity(record_id, None, place)
        return Identity(record_id, _as_id(subject, config.subject_field, place), place)

    return identify


def _as_id(value: Any, column: str, place: str) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # whole numbers with a gap arrive as floats; subject 12 must not become '12.0'
    text = str(value) if isinstance(value, str | int) and not isinstance(value, bool) else None
    if text is None or len(text) > _LONGEST_ID or not _is_unicode(text):
        got = type(value).__name__ if text is None else f"text of {len(text)} characters"
        raise DataError(
            f"{got} in column '{column}', {place}",
            f"ids that are text of at most {_LONGEST_ID} characters or whole numbers",
            "write the ids in another way, or name another column",
        )
    return text


def _is_unicode(text: str) -> bool:
    """False for halves of surrogate pairs, which JSON can spell and no file or tokenizer can hold."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def _text(row: Row, column: str, identity: Identity) -> str:
    value = row.get(column)
    if not isinstance(value, str) or not _is_unicode(value):
        got = "half a surrogate pair" if isinstance(value, str) else type(value).__name__
        raise DataError(
            f"{got} in column '{column}' of {identity}",
            "text",
            "correct or remove the record, or name another column",
        )
    return value


def _reader(config: DataConfig, names: tuple[str, ...] | None) -> Callable[[Row, Identity], TextRecord]:
    """The function that turns one row into one record, for the format of `config`."""

    def question_answer(row: Row, identity: Identity) -> TextRecord:
        # replace, not format: the template may hold other braces
        prompt = config.prompt_template.replace("{prompt}", _text(row, config.question_field, identity))
        return TextRecord(identity.record_id, identity.subject_id, prompt, _text(row, config.answer_field, identity))

    def text(row: Row, identity: Identity) -> TextRecord:
        return TextRecord(identity.record_id, identity.subject_id, "", _text(row, config.text_field, identity))

    def chat(row: Row, identity: Identity) -> TextRecord:
        messages = _messages(row.get(config.messages_field), config.messages_field, identity)
        return TextRecord(identity.record_id, identity.subject_id, "", messages[-1]["content"], messages)

    def classification(row: Row, identity: Identity) -> TextRecord:
        words = _text(row, config.text_field, identity)
        prompt, start = config.prompt_template.replace("{prompt}", words), config.prompt_template.index("{prompt}")
        word = _label_word(row.get(config.label_field), names, identity)
        span = (start, start + len(words))
        return TextRecord(identity.record_id, identity.subject_id, prompt, word, shortenable=span)

    return {"question_answer": question_answer, "text": text, "chat": chat, "classification": classification}[
        config.format
    ]


def _messages(value: Any, column: str, identity: Identity) -> tuple[dict[str, str], ...]:
    """Check a conversation: role and content everywhere, someone speaks before the assistant's last word."""
    is_list = isinstance(value, list) and all(isinstance(message, Mapping) for message in value)
    parts = [(message.get("role"), message.get("content")) for message in value] if is_list else []
    typed = all(isinstance(text, str) and _is_unicode(text) for part in parts for text in part)
    if len(parts) < 2 or not typed or parts[-1][0] != "assistant":
        raise DataError(
            f"column '{column}' of {identity} with {len(parts)} readable message(s)",
            "a list of at least two {role, content} messages of text, the last one by the assistant",
            "correct or remove the record",
        )
    return tuple({"role": role, "content": content} for role, content in parts)


def _label_word(value: Any, names: tuple[str, ...] | None, identity: Identity) -> str:
    if value is None:
        raise DataError(f"a null label in {identity}", "a label", "correct or remove the record")
    if isinstance(value, bool | float) or not isinstance(value, str | int):
        got = f"{type(value).__name__} as the label of {identity}"
        raise DataError(got, "text or a whole number", "correct or remove the record")
    if names is None or value in names:
        return str(value)
    if isinstance(value, str) and value.isascii() and value.isdigit():
        value = int(value)  # of a CSV file, where everything is text
    if not isinstance(value, int) or not 0 <= value < len(names):
        shown = value if isinstance(value, int) else f"of type {type(value).__name__}"
        raise DataError(
            f"label {shown} in {identity}",
            f"a class number from 0 to {len(names) - 1}, as there are {len(names)} label names",
            "correct data.label_names, or remove it to use the label column's own text",
        )
    return names[value]


def refuse_duplicates(record_ids: Sequence[str]) -> None:
    """Refuse ids that occur twice.

    Raises:
        DataError: there are some.
    """
    counts = Counter(record_ids)
    repeated = [record_id for record_id, count in counts.items() if count > 1]
    if repeated:
        raise DataError(
            f"{len(repeated)} record id(s) that occur more than once, e.g. {', '.join(map(repr, repeated[:5]))}",
            "every id once",
            "make the ids unique, or set data.id_field to a column that is",
        )
