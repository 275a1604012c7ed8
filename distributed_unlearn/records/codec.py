"""Dataclasses of this package to JSON and back, strictly: what is written can be read, and nothing else.

NaN and infinity, which JSON does not have, are written as null; a float that was null is read as NaN, a
`float | None` as None.
"""

import dataclasses
import json
import math
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, TypeAlias, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from distributed_unlearn.errors import DataError

Json: TypeAlias = "None | bool | int | float | str | list[Json] | dict[str, Json]"
Record = TypeVar("Record")


def to_json(value: object) -> Json:
    """`value` as JSON can hold it: dataclasses and mappings as objects, sequences as lists, NaN as null.

    Raises:
        TypeError: a value of another type, a tensor for instance.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    raise TypeError(f"cannot write {type(value).__name__} as JSON")


def read_json(path: Path, what: str, remedy: str) -> Json:
    """JSON in a file.

    Raises:
        DataError: no such file, or no JSON; `what` and `remedy` are of the error.
    """
    try:
        tree: Json = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not JSON"
        raise DataError(f"{what}, which cannot be read ({reason})", "the file as a run wrote it", remedy) from error
    return tree


def read_formatted(
    kind: type[Record],
    path: Path,
    name: str,
    wanted: int,
    unreadable_remedy: str,
    format_remedies: Mapping[int | None, str],
) -> Record:
    """A dataclass from a file that says its format.

    Args:
        kind: The dataclass.
        path: The file.
        name: What it is, for errors.
        wanted: The only format that is read.
        unreadable_remedy: Where there is no such file, or no JSON in it.
        format_remedies: By another format, what to do; under None of any that is not named.

    Raises:
        DataError: no such file, no JSON, another format, or a field that is missing, unknown or of another type.
    """
    what = f"{name} '{path}'"
    tree = read_json(path, what, unreadable_remedy)
    found = tree.get("format") if isinstance(tree, dict) else None
    if type(found) is not int or found != wanted:
        remedy = format_remedies.get(found if type(found) is int else None, format_remedies[None])
        raise DataError(f"{what} of format {found!r}", f"format {wanted}", remedy)
    return from_json(kind, tree, what)


def from_json(kind: type[Record], value: Json, where: str) -> Record:
    """A dataclass from what `to_json` made of it.

    Args:
        kind: The dataclass; its annotations say what each field may hold.
        value: As read.
        where: Named in the error, e.g. the file.

    Raises:
        DataError: a field that is missing, unknown or of another type.
    """
    return cast(Record, _read(kind, value, where))


def _refusal(where: str, got: str, expected: str) -> DataError:
    return DataError(
        f"{where}, {got}",
        expected,
        "use the file as it was written, with the version of distributed-unlearn that wrote it",
    )


def _read(kind: object, value: Json, where: str) -> object:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is object or isinstance(kind, str):  # a tree of JSON, taken as it is
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (only,) = (argument for argument in arguments if argument is not type(None))
        return _read(only, value, where)
    if origin is Literal:
        if value not in arguments:
            raise _refusal(where, "which is none of its values", " or ".join(map(repr, arguments)))
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise _refusal(where, f"which is {_name(value)}", "a list")
        return tuple(_read(arguments[0], item, f"{where}.{index}") for index, item in enumerate(value))
    if origin is dict:
        return {key: _read(arguments[1], item, f"{where}.{key}") for key, item in _object(value, where).items()}
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _read_fields(kind, _object(value, where), where)
    return _read_plain(kind, value, where)


def _read_fields(kind: type, tree: dict[str, Json], where: str) -> object:
    fields, hints = dataclasses.fields(kind), get_type_hints(kind)
    unknown = sorted(tree.keys() - {field.name for field in fields})
    if unknown:
        raise _refusal(where, f"with unknown {', '.join(unknown)}", f"the fields of {kind.__name__} alone")
    found = {}
    for field in fields:
        if field.name in tree:
            found[field.name] = _read(hints[field.name], tree[field.name], f"{where}.{field.name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise _refusal(where, f"without {field.name}", f"every field of {kind.__name__}")
    return kind(**found)


def _read_plain(kind: object, value: Json, where: str) -> object:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is float and (value is None or is_number):
        return math.nan if value is None else float(cast(float, value))
    if kind is int and is_number and isinstance(value, int):
        return value
    if kind in (bool, str) and isinstance(value, cast(type, kind)):
        return value
    raise _refusal(where, f"which is {_name(value)}", getattr(kind, "__name__", str(kind)))


def _object(value: Json, where: str) -> dict[str, Json]:
    if not isinstance(value, dict):
        raise _refusal(where, f"which is {_name(value)}", "an object with named fields")
    return value


def _name(value: Json) -> str:
    return "null" if value is None else type(value).__name__
