"""Rows of local files as they are spelt, without a copy on disk: JSON lines, JSON, CSV, Parquet, and folders of them.

The readers of `datasets` write what they read into a cache. A process that is killed leaves that cache behind, with
the text of people who asked to be forgotten; so files are read here, and only names on the Hub go through `datasets`.
Every complaint names a file and a line, never what stands there.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet

from distributed_unlearn.config import DataConfig
from distributed_unlearn.errors import ConfigError, DataError
from distributed_unlearn.files import scratch_folder

Row = Mapping[str, Any]
SPLIT_WORDS = {"train": "train", "training": "train", "test": "test", "testing": "test", "eval": "test"}
SPLIT_WORDS |= {"validation": "validation", "valid": "validation", "val": "validation", "dev": "validation"}
"""Words in a file's path below a folder that say which split it belongs to, as `datasets` reads them."""


@dataclass(frozen=True, eq=False)
class _Part:
    """The rows of one file."""

    name: str
    rows: Sequence[Row]
    lines: Sequence[int] | None
    """Where each row begins, from 1; None of a file without lines."""
    has_header: bool = False
    """Its columns' names are text of the file, which may be a record where the header is missing."""

    def place(self, index: int) -> str:
        """Where a row stands, for an error."""
        number = f"row {index + 1}" if self.lines is None else f"line {self.lines[index]}"
        return f"{number} of '{self.name}'"


class Table:
    """Rows of one or several sources, in order."""

    def __init__(self, parts: Sequence[_Part], indices: np.ndarray | None = None) -> None:
        self._parts = parts
        starts = np.cumsum([0, *(len(part.rows) for part in parts)])
        self._starts, self._indices = starts, np.arange(starts[-1]) if indices is None else indices

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self) -> Iterator[Row]:
        for index in range(len(self)):
            part, at = self._at(index)
            yield part.rows[at]

    def _at(self, index: int) -> tuple[_Part, int]:
        position = int(self._indices[index])
        number = int(np.searchsorted(self._starts, position, side="right")) - 1
        return self._parts[number], position - int(self._starts[number])

    def number(self, index: int) -> int:
        """The number of row `index` among all rows of its source, from 0, whatever the split takes of them."""
        return int(self._indices[index])

    def place(self, index: int) -> str:
        """Where row `index` stands, for an error: file and line, never its text."""
        part, at = self._at(index)
        return part.place(at)

    @property
    def column_names(self) -> tuple[str, ...]:
        """Names of all columns, of every row that has some, in the order in which they are met."""
        names: dict[str, None] = {}
        for part in self._parts:
            if isinstance(part.rows, datasets.Dataset):
                names.update(dict.fromkeys(part.rows.column_names))
            else:
                names.update((name, None) for row in part.rows for name in row)
        return tuple(names)

    def describe_columns(self) -> str:
        """The columns for an error: by number where their names may be text of a record, else by name."""
        names = self.column_names
        if any(part.has_header for part in self._parts):
            return f"{len(names)} column(s), named by its first line"
        everywhere = [name for name in names if all(name in row for part in self._parts for row in _first(part.rows))]
        if len(names) > 40 or not all(name in everywhere and name.isidentifier() for name in names):
            return f"{len(names)} columns, not all of them in every row"
        return ", ".join(map(repr, names))

    def class_names(self, column: str) -> tuple[str, ...] | None:
        """The names of a column's classes, where the data itself declares them."""
        rows = self._parts[0].rows
        feature = rows.features.get(column) if isinstance(rows, datasets.Dataset) else None
        return tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else None


def _first(rows: Sequence[Row], count: int = 100) -> Iterator[Row]:
    return (rows[index] for index in range(min(count, len(rows))))


@contextmanager
def open_rows(config: DataConfig) -> Iterator[Table]:
    """All rows of `config.path` and its split, for the length of the block.

    Raises:
        DataError: a file that is missing or cannot be read, a line that is no row, a split that is not there, no rows.
        ConfigError: settings that belong to other files.
    """
    paths = [config.path] if isinstance(config.path, str) else list(config.path)
    local = [path for path in paths if _is_local(path)]
    with scratch_folder() as cache, quiet_datasets():
        if not local:
            table = _hub_table(config, paths, str(cache))
        elif len(local) < len(paths):
            raise ConfigError("data.path with files and names of the Hub", "one or the other", "load them in two jobs")
        else:
            table = _local_table(config, paths, str(cache))
        if len(table) == 0:
            raise DataError(f"no rows in {_shown(config)}", "at least one record", "check data.path and data.split")
        yield table


def _shown(config: DataConfig) -> str:
    return f"'{config.path}'" if isinstance(config.path, str) else f"{len(config.path)} files of data.path"


@contextmanager
def quiet_datasets() -> Iterator[None]:
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


def _is_local(path: str) -> bool:
    found = Path(path).expanduser()
    return found.exists() or found.is_absolute() or path.startswith((".", "~")) or found.suffix.lower() in READERS


def _hub_table(config: DataConfig, paths: Sequence[str], cache: str) -> Table:
    base = config.split.split("[")[0]
    if len(paths) > 1 or "+" in config.split:
        return Table([_from_hub(config, path, config.split, cache) for path in paths])
    # The slice is taken here, so that a row has the same number in every slice of its split.
    return _split_table([_from_hub(config, paths[0], base, cache)], config.split, {base})


def _from_hub(config: DataConfig, path: str, split: str, cache: str) -> _Part:
    """A data set of the Hub, or a local folder that only `datasets` can read, e.g. of images."""
    local = Path(path).is_dir()
    arguments = {"cache_dir": cache, "keep_in_memory": True} if local else {}
    try:
        return _Part(path, datasets.load_dataset(path, name=config.name, split=split, **arguments), None)
    except Exception as error:
        # Whatever `datasets` raises (its parsers raise a dozen types) may quote text: keep its type, drop the rest.
        raise DataError(
            f"'{path}' (name {config.name}, split '{config.split}'), which failed to load with {type(error).__name__}",
            "a readable file or folder, or a Hub data set that can be reached",
            "check data.path, data.name and data.split",
        ) from None


def _local_table(config: DataConfig, spelt: Sequence[str], cache: str) -> Table:
    paths = [Path(path).expanduser() for path in spelt]
    for path, text in zip(paths, spelt, strict=True):
        if not path.exists():
            raise DataError(f"'{text}', which does not exist", "an existing file or folder", "check data.path")
    if len(paths) == 1 and paths[0].is_dir():
        return _folder_table(config, paths[0], cache)
    if config.name is not None:
        raise ConfigError("data.name with a file", "data.name for data sets of the Hub alone", "remove data.name")
    names = {part.split("[")[0] for part in config.split.split("+")}  # of a file, any name stands for all of it
    return _split_table([_read_file(config, path) for path in paths], config.split, names)


def _split_table(parts: Sequence[_Part], split: str, names: set[str]) -> Table:
    """The rows that a split such as `train[:80%]` takes of all rows, which every one of `names` stands for."""
    count = sum(len(part.rows) for part in parts)
    try:
        pieces = datasets.ReadInstruction.from_spec(split).to_absolute(dict.fromkeys(names, count))
    except (ValueError, AssertionError, KeyError):
        raise DataError(f"data.split '{split}'", "e.g. train or train[:80%]", "correct data.split") from None
    ranges = [np.arange(piece.from_ or 0, count if piece.to is None else piece.to) for piece in pieces]
    return Table(parts, np.concatenate(ranges))


def _folder_table(config: DataConfig, folder: Path, cache: str) -> Table:
    base = config.split.split("[")[0]
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        return _split_table([_saved_dataset(folder, base)], config.split, {base})
    files = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in READERS and path.is_file()]
    files = [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    if config.format == "image" or not files or config.name is not None:
        return _hub_table(config, [str(folder)], cache)
    splits: dict[str, list[Path]] = {}
    for path in files:
        words = re.split(r"[^a-z]+", path.relative_to(folder).as_posix().lower())
        splits.setdefault(next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), "train"), []).append(path)
    if base not in splits:
        raise DataError(
            f"split '{base}' of '{folder}', which has {', '.join(sorted(splits))}",
            "a split that one of its files is named after",
            "correct data.split, or name the file itself in data.path",
        )
    return _split_table([_read_file(config, path) for path in splits[base]], config.split, {base})


def _saved_dataset(folder: Path, split: str) -> _Part:
    """What `save_to_disk` of `datasets` wrote; its files are mapped into memory, not copied."""
    try:
        found = datasets.load_from_disk(str(folder))
        return _Part(str(folder), found[split] if isinstance(found, datasets.DatasetDict) else found, None)
    except Exception as error:
        raise DataError(
            f"'{folder}' and its split '{split}', which failed to load with {type(error).__name__}",
            "a folder as save_to_disk of datasets writes it, with this split",
            "check data.path and data.split",
        ) from None


def _read_file(config: DataConfig, path: Path) -> _Part:
    suffix = path.suffix.lower()
    if path.is_dir() or suffix not in READERS:
        what = "which is a folder" if path.is_dir() else f"with suffix '{suffix}'"
        raise DataError(f"'{path}', {what}", f"a file that ends in {', '.join(READERS)}", "convert or rename the file")
    if config.columns is not None and suffix != ".csv":
        raise ConfigError(f"data.columns with '{path}'", "data.columns for CSV files alone", "remove data.columns")
    try:
        if path.stat().st_size == 0:
            raise DataError(f"'{path}', which is empty", "at least one record", "check data.path")
        return READERS[suffix](path, config.columns)
    except OSError as error:
        got = f"'{path}', which cannot be read ({error.strerror or type(error).__name__})"
        raise DataError(got, "a readable file", "check data.path and its permissions") from None


def _defect(path: Path, line: int | None, what: str, expected: str) -> DataError:
    place = f"'{path}'" if line is None else f"line {line} of '{path}'"
    return DataError(f"{place}, {what}", expected, "correct or remove it" if line is not None else "correct the file")


def _decode(raw: bytes, path: Path, line: int | None) -> str:
    try:
        return raw.decode("utf-8-sig" if line in (None, 1) else "utf-8")
    except UnicodeDecodeError as error:
        at = line if line is not None else raw[: error.start].count(b"\n") + 1
        raise _defect(path, at, "which is not UTF-8 text", "UTF-8; convert e.g. latin-1 with iconv") from None


def _refuse_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("with a key given twice")
    return found


def _refuse_constant(name: str) -> float:
    raise ValueError(f"with {name}, which is not JSON")


def _parse(text: str, path: Path, line: int | None) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_refuse_twice, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        at = error.lineno if line is None else line
        raise _defect(path, at, f"which is not JSON ({error.msg}, column {error.colno})", "valid JSON") from None
    except RecursionError:
        raise _defect(path, line, "which is nested too deeply", "a flat record") from None
    except ValueError as error:  # from the two functions above, which quote nothing; or a number of 5,000 digits
        reason = str(error) if str(error).startswith("with ") else "with a number that is too long"
        raise _defect(path, line, reason, "valid JSON") from None


def _require_object(value: Any, path: Path, line: int | None, number: int) -> dict[str, Any]:
    if not isinstance(value, dict):
        what = f"which holds {type(value).__name__}" if line is not None else f"whose item {number} is not an object"
        raise _defect(path, line, what, 'one record: {"column": value, ...}')
    return value


def _read_json_lines(path: Path, columns: tuple[str, ...] | None) -> _Part:
    rows: list[Row] = []
    lines: list[int] = []
    with path.open("rb") as handle:
        for line, raw in enumerate(handle, start=1):
            text = _decode(raw, path, line)
            if text.strip():
                rows.append(_require_object(_parse(text, path, line), path, line, len(rows)))
                lines.append(line)
    return _Part(str(path), rows, lines)


def _read_json(path: Path, columns: tuple[str, ...] | None) -> _Part:
    """A list of objects, or one object a line."""
    with path.open("rb") as handle:
        beginning = handle.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not beginning.startswith(b"["):
        return _read_json_lines(path, columns)
    rows = _parse(_decode(path.read_bytes(), path, None), path, None)
    assert isinstance(rows, list)
    return _Part(str(path), [_require_object(row, path, None, index + 1) for index, row in enumerate(rows)], None)


def _read_csv(path: Path, columns: tuple[str, ...] | None) -> _Part:
    """Every value as text, as it is spelt: CSV has no types."""
    text = _decode(path.read_bytes(), path, None)
    rows: list[Row] = []
    lines: list[int] = []
    names = None if columns is None else list(columns)
    limit = csv.field_size_limit(max(len(text), 1))
    try:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        while True:
            line = reader.line_num + 1
            values = next(reader, None)
            if values is None:
                break
            if not values:
                continue
            if names is None:
                names = values
                if len(set(names)) < len(names):
                    raise _defect(path, line, "whose column names are not all different", _COLUMNS)
                continue
            if len(values) != len(names):
                what = f"which has {len(values)} field(s) where {len(names)} columns are"
                raise _defect(path, line, what, "a field for every column; quote fields that hold commas")
            rows.append(dict(zip(names, values, strict=True)))
            lines.append(line)
    except csv.Error:
        raise _defect(path, reader.line_num, "whose quotes or line ends do not match", "RFC 4180 CSV") from None
    finally:
        csv.field_size_limit(limit)
    return _Part(str(path), rows, lines, has_header=columns is None)


_COLUMNS = "a first line that names the columns; of a file without one, name them in data.columns"


def _read_parquet(path: Path, columns: tuple[str, ...] | None) -> _Part:
    try:
        return _Part(str(path), datasets.Dataset(datasets.table.InMemoryTable(pyarrow.parquet.read_table(path))), None)
    except Exception as error:  # Arrow's errors quote the file's first bytes
        raise _defect(path, None, f"which cannot be read ({type(error).__name__})", "a Parquet file") from None


READERS: dict[str, Callable[[Path, tuple[str, ...] | None], _Part]] = {
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
"""Suffix to the reader of such files."""
