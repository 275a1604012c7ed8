"""Reads training records: anything that `datasets` loads becomes a list of `TextRecord`.

No message here ever shows a record's text: ids, counts and column names only.
"""

import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from distributed_unlearn.config import DataConfig
from distributed_unlearn.errors import ConfigError, DataError

BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
"""File suffix to the builder of `datasets` that reads it."""


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


def load_records(config: DataConfig) -> list[TextRecord]:
    """Read every record of `config.path`, in file order.

    Args:
        config: Where the records are, and which columns make prompt, answer, id and subject.

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
    with open_table(config) as table:
        names = _label_names(config, table)
        read = _reader(config, names)
        records = [read(row, identity_of(config, row, index)) for index, row in enumerate(table)]
    refuse_duplicates([record.record_id for record in records])
    return records


@dataclass(frozen=True)
class Identity:
    """What names a record."""

    record_id: str
    subject_id: str | None


@contextmanager
def open_table(config: DataConfig) -> Iterator[datasets.Dataset]:
    """The rows of `config.path` with the columns that its format needs, for the length of the block.

    Raises:
        DataError: missing file, unreadable file, missing column, or no rows.
    """
    with tempfile.TemporaryDirectory(prefix="distributed-unlearn-") as private_cache, _quiet_datasets():
        table = _load_table(config, private_cache)
        if len(table) == 0:
            raise DataError(f"no rows in '{config.path}'", "at least one record", "check data.path and data.split")
        _require_columns(config, table)
        yield table


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Silence `datasets`: no progress bars, and no log lines, since those of a parse error quote the file's text."""
    had_bars = not datasets.are_progress_bars_disabled()
    verbosity = datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if had_bars:
            datasets.enable_progress_bars()


def _load_table(config: DataConfig, private_cache: str) -> datasets.Dataset:
    path = Path(config.path).expanduser()
    suffix = path.suffix.lower()
    looks_local = path.is_absolute() or config.path.startswith((".", "~")) or suffix in BUILDERS
    if not path.exists() and looks_local:
        raise DataError(f"'{config.path}', which does not exist", "an existing file or folder", "check data.path")
    if path.is_file() and suffix not in BUILDERS:
        raise DataError(
            f"'{config.path}' with suffix '{suffix}'", f"one of {', '.join(BUILDERS)}", "convert or rename the file"
        )
    if path.is_file() and path.stat().st_size == 0:
        raise DataError(f"'{config.path}', which is empty", "at least one record", "check data.path")
    try:
        if path.exists():
            return _load_local(config, path, private_cache)
        return datasets.load_dataset(config.path, name=config.name, split=config.split)
    except Exception as error:
        # Whatever `datasets` raises (its parsers raise a dozen types) may quote text: keep its type, drop the rest.
        raise DataError(
            f"'{config.path}' (name {config.name}, split '{config.split}'), which failed to load with "
            f"{type(error).__name__}",
            "a readable file or folder, or a Hub data set that can be reached",
            "check data.path, data.name and data.split, and that the file has rows, all with the same columns",
        ) from None


def _load_local(config: DataConfig, path: Path, private_cache: str) -> datasets.Dataset:
    """Read a file or folder without the network.

    It goes through a cache of our own that is deleted again: the default cache would keep a plain copy of records
    that someone may have asked to erase.
    """
    arguments: dict[str, Any] = {"split": config.split, "cache_dir": private_cache, "keep_in_memory": True}
    if path.is_file():
        base_split = re.split(r"[\[+]", config.split)[0]  # `train[:10%]` reads the split `train`
        arguments |= {"path": BUILDERS[path.suffix.lower()], "data_files": {base_split: str(path)}}
    else:
        arguments |= {"path": str(path), "name": config.name}
    if path.suffix.lower() != ".csv" and not any(path.glob("**/*.csv")):
        return datasets.load_dataset(**arguments)
    # CSV has no types, and the reader's guesses would rewrite values: id 007 as 7, the answer NA as missing.
    # So the file is read once for its columns and again with the columns we use as text.
    guessed = datasets.load_dataset(**arguments, keep_default_na=False).features
    used = {config.id_field, config.subject_field, *_needed_columns(config)}
    if config.label_names is not None:
        used.discard(config.label_field)
    text = {column: datasets.Value("string") for column in used if column in guessed}
    return datasets.load_dataset(**arguments, keep_default_na=False, features=datasets.Features({**guessed, **text}))


def _needed_columns(config: DataConfig) -> tuple[str, ...]:
    return {
        "question_answer": (config.question_field, config.answer_field),
        "text": (config.text_field,),
        "chat": (config.messages_field,),
        "classification": (config.text_field, config.label_field),
        "image": (config.image_field, config.label_field),
    }[config.format]


def _require_columns(config: DataConfig, table: datasets.Dataset) -> None:
    missing = [name for name in _needed_columns(config) if name not in table.column_names]
    if missing:
        raise DataError(
            f"no column {', '.join(repr(name) for name in missing)} in '{config.path}', which has "
            f"{', '.join(repr(name) for name in table.column_names)}",
            f"the columns of format {config.format}",
            "set data.format or the data.*_field that names the column",
        )


def _label_names(config: DataConfig, table: datasets.Dataset) -> tuple[str, ...] | None:
    """`config.label_names`, else the names that the data set itself declares for its label column."""
    if config.label_names is not None or config.format != "classification":
        return config.label_names
    feature = table.features[config.label_field]
    return tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else None


def identity_of(config: DataConfig, row: dict[str, Any], index: int) -> Identity:
    """A row's id, `row-<index>` where the data has no ids, and whose record it is.

    Raises:
        DataError: an empty id, or one that is neither text nor a whole number.
    """
    record_id = f"row-{index}"
    if config.id_field in row:
        if row[config.id_field] in (None, ""):
            raise DataError(
                f"no id in column '{config.id_field}' of row {index}", "an id in every row", "fill in the ids"
            )
        record_id = _as_id(row[config.id_field], config.id_field, index)
    subject = row.get(config.subject_field) if config.subject_field is not None else None
    if subject in (None, "") or config.subject_field is None:
        return Identity(record_id, None)
    return Identity(record_id, _as_id(subject, config.subject_field, index))


def _as_id(value: Any, column: str, index: int) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # whole numbers with a gap arrive as floats; subject 12 must not become '12.0'
    if isinstance(value, bool) or not isinstance(value, str | int):
        # Text that looks like a date arrives as one, and would no longer be spelt as in the file.
        raise DataError(
            f"{type(value).__name__} in column '{column}' of row {index}",
            "ids that are text or whole numbers",
            "write the ids in another way, or name another column",
        )
    return str(value)


def _text(row: dict[str, Any], column: str, identity: Identity) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise DataError(
            f"{type(value).__name__} in column '{column}' of record '{identity.record_id}'",
            "text",
            "correct or remove the record, or name another column",
        )
    return value


def _reader(config: DataConfig, names: tuple[str, ...] | None) -> Callable[[dict[str, Any], Identity], TextRecord]:
    """The function that turns one row into one record, for the format of `config`."""

    def question_answer(row: dict[str, Any], identity: Identity) -> TextRecord:
        # replace, not format: the template may hold other braces
        prompt = config.prompt_template.replace("{prompt}", _text(row, config.question_field, identity))
        return TextRecord(identity.record_id, identity.subject_id, prompt, _text(row, config.answer_field, identity))

    def text(row: dict[str, Any], identity: Identity) -> TextRecord:
        return TextRecord(identity.record_id, identity.subject_id, "", _text(row, config.text_field, identity))

    def chat(row: dict[str, Any], identity: Identity) -> TextRecord:
        messages = _messages(row[config.messages_field], config.messages_field, identity)
        return TextRecord(identity.record_id, identity.subject_id, "", messages[-1]["content"], messages)

    def classification(row: dict[str, Any], identity: Identity) -> TextRecord:
        prompt = config.prompt_template.replace("{prompt}", _text(row, config.text_field, identity))
        word = _label_word(row[config.label_field], names, identity)
        return TextRecord(identity.record_id, identity.subject_id, prompt, word)

    return {"question_answer": question_answer, "text": text, "chat": chat, "classification": classification}[
        config.format
    ]


def _messages(value: Any, column: str, identity: Identity) -> tuple[dict[str, str], ...]:
    """Check a conversation: role and content everywhere, someone speaks before the assistant's last word."""
    is_list = isinstance(value, list) and all(isinstance(message, dict) for message in value)
    parts = [(message.get("role"), message.get("content")) for message in value] if is_list else []
    typed = all(isinstance(role, str) and isinstance(content, str) for role, content in parts)
    if len(parts) < 2 or not typed or parts[-1][0] != "assistant":
        raise DataError(
            f"column '{column}' of record '{identity.record_id}' with {len(parts)} readable message(s)",
            "a list of at least two {role, content} messages of text, the last one by the assistant",
            "correct or remove the record",
        )
    return tuple({"role": role, "content": content} for role, content in parts)


def _label_word(value: Any, names: tuple[str, ...] | None, identity: Identity) -> str:
    if value is None:
        raise DataError(f"a null label in record '{identity.record_id}'", "a label", "correct or remove the record")
    if names is None:
        return str(value)
    if not isinstance(value, int) or not 0 <= value < len(names):
        shown = value if isinstance(value, int) else f"of type {type(value).__name__}"
        raise DataError(
            f"label {shown} in record '{identity.record_id}'",
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
