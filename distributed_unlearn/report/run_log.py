"""The run's numbers as they happen: one JSON object a line in `metrics.jsonl`, scalars mirrored to TensorBoard."""

import json
import math
import shutil
import time
from collections.abc import Mapping
from numbers import Integral, Real
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch.utils.tensorboard import SummaryWriter


def _clean(value: Any, path: str, non_finite: dict[str, str]) -> Any:
    """`value` as JSON can hold it; floats that JSON cannot hold become null and are named in `non_finite`."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        number = float(value)
        if math.isfinite(number):
            return number
        non_finite[path] = str(number)
        return None
    if isinstance(value, Mapping):
        return {
            str(key): _clean(item, f"{path}.{key}" if path else str(key), non_finite) for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_clean(item, f"{path}.{index}" if path else str(index), non_finite) for index, item in enumerate(value)]
    raise TypeError(f"cannot log {type(value).__name__} at '{path}'; log numbers, strings and containers of them")


def _scalars(value: Any, path: str) -> dict[str, float]:
    """The numbers in nested mappings by `a/b` path; lists are left to the JSON lines."""
    if isinstance(value, Mapping):
        found: dict[str, float] = {}
        for key, item in value.items():
            found.update(_scalars(item, f"{path}/{key}"))
        return found
    if isinstance(value, bool | int | float):
        return {path: float(value)}
    return {}


def _set_aside(directory: Path) -> None:
    """Rename an earlier run's files to `*.previous`, so that figures of two runs are never mixed and none is lost."""
    pairs = (
        (directory / "metrics.jsonl", directory / "metrics.previous.jsonl"),
        (directory / "tensorboard", directory / "tensorboard.previous"),
    )
    lines = pairs[0][0]
    if not (lines.is_file() and lines.stat().st_size > 0):
        return  # a run that ended before its first line displaces nothing
    for current, previous in pairs:
        if previous.is_dir():
            shutil.rmtree(previous)
        if current.exists():
            current.replace(previous)


class RunLog:
    """Writes `directory/metrics.jsonl`, flushed line by line, and `directory/tensorboard`.

    A line is `{"kind", "step", "elapsed_seconds", "values"}` and, only when some value was NaN or infinite (null in
    `values`), `"non_finite": {"path.of.value": "nan"}`. What an earlier run left is kept under `metrics.previous.jsonl`
    and `tensorboard.previous`, one generation.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        _set_aside(directory)
        self.path = directory / "metrics.jsonl"
        self._file = self.path.open("w", encoding="utf-8")
        self._writer = SummaryWriter(str(directory / "tensorboard"))
        self._start = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def log(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Append one line, e.g. `log("step", 3, dataclasses.asdict(record))`. Ids and numbers, no text of records.

        Args:
            kind: What this is (`step`, `round`, `evaluation`); also the prefix of the TensorBoard tags.
            step: TensorBoard's horizontal axis.
            values: Possibly nested mappings and sequences of numbers, strings, booleans and None.

        Raises:
            TypeError: a value of another type, a tensor for instance; nothing is written then.
        """
        non_finite: dict[str, str] = {}
        cleaned = _clean(values, "", non_finite)
        line: dict[str, Any] = {
            "kind": kind,
            "step": int(step),
            "elapsed_seconds": round(time.monotonic() - self._start, 3),
            "values": cleaned,
        }
        if non_finite:
            line["non_finite"] = non_finite
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        for tag, number in _scalars(cleaned, kind).items():
            self._writer.add_scalar(tag.replace(" ", "_"), number, int(step))

    def close(self) -> None:
        """Flush and close both files; harmless when called twice."""
        if not self._file.closed:
            self._file.close()
            self._writer.close()
