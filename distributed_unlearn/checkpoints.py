"""Folders that are complete or absent, the record beside a result, and its model card.

A result is written into a hidden folder beside its destination, flushed, and renamed when complete: a crash
leaves the destination as it was. Only a machine that stops between the two renames of a replacement leaves the
old folder under its hidden name, `.NAME.replaced-*`.
"""

import hashlib
import json
import os
import platform
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from distributed_unlearn.errors import ConfigError, ModelError


def _flush(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as handle:
                os.fsync(handle.fileno())
    for path in (*folder.rglob("*"), folder):
        if path.is_dir():
            _flush_names(path)


def _flush_names(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def refuse_existing(destination: Path, overwrite: bool) -> None:
    """Refuse a destination that exists, before any work is done.

    Raises:
        ConfigError: it exists and `overwrite` is false.
    """
    if destination.exists() and not overwrite:
        raise ConfigError(
            f"output '{destination}', which exists",
            "a folder that does not exist yet",
            "choose another output or set overwrite: true",
        )


@contextmanager
def complete_folder(destination: Path, overwrite: bool) -> Iterator[Path]:
    """A staging folder that becomes `destination` when the block ends without an error, else vanishes.

    Raises:
        ConfigError: `destination` exists and `overwrite` is false.
    """
    refuse_existing(destination, overwrite)
    destination.parent.mkdir(parents=True, exist_ok=True)
    tag = f"{os.getpid()}-{secrets.token_hex(4)}"
    staging = destination.with_name(f".{destination.name}.writing-{tag}")
    staging.mkdir()
    try:
        yield staging
        _flush(staging)
        if destination.exists():
            old = destination.with_name(f".{destination.name}.replaced-{tag}")
            destination.rename(old)
            try:
                staging.rename(destination)
            except BaseException:
                old.rename(destination)
                raise
            _flush_names(destination.parent)
            shutil.rmtree(old)
        else:
            staging.rename(destination)
            _flush_names(destination.parent)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def hash_folder(folder: Path, suffixes: tuple[str, ...] = (".safetensors", ".json")) -> dict[str, str]:
    """SHA-256 of the folder's own files with these suffixes, by name."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix in suffixes:
            with path.open("rb") as handle:
                found[path.name] = hashlib.file_digest(handle, "sha256").hexdigest()
    return found


def hash_ids(ids: Iterable[str], salt: str) -> list[str]:
    """SHA-256 of `salt`, a zero byte and the id, for each id; sorted, so that the order tells nothing."""
    return sorted(hashlib.sha256(f"{salt}\0{name}".encode()).hexdigest() for name in ids)


def new_salt() -> str:
    """128 random bits in hexadecimal."""
    return secrets.token_hex(16)


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    names = ("distributed-unlearn", "torch", "transformers", "deepspeed", "accelerate", "ray", "datasets", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def write_json(path: Path, value: Any) -> None:
    """Write JSON with sorted keys; NaN and infinity are refused rather than written as invalid JSON."""
    text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as handle:
        handle.write(text + "\n")


def model_card(base: str, summary: list[str]) -> str:
    """README.md of a result: what was done, in counts and scalars; never ids or text of erased records."""
    lines = "\n".join(f"- {line}" for line in summary)
    return (
        "---\n"
        "library_name: transformers\n"
        "tags: [machine-unlearning]\n"
        "---\n\n"
        "# Unlearned checkpoint\n\n"
        f"Derived from `{base}` by `distributed-unlearn`: records were erased with cubic-regularised Newton steps\n"
        "(arXiv 2406.14507) or the first-order method named below. Erased records are not named here; `record.json`\n"
        "holds their salted hashes, every step's scalars and the evaluation.\n\n"
        f"{lines}\n"
    )


def require_safetensors(path: str) -> None:
    """Refuse a local folder without safetensors weights; a hub name is checked when it is loaded.

    Raises:
        ModelError: no such folder, or no `*.safetensors` in it.
    """
    folder = Path(path)
    looks_local = path.startswith((".", "/", "~")) or folder.exists() or path.count("/") > 1
    if not looks_local:
        return
    if not folder.is_dir():
        raise ModelError(f"model path '{path}', which is no folder", "an existing checkpoint folder", "check the path")
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"model path '{path}' without *.safetensors",
            "safetensors weights; pickled weights are never loaded",
            "convert the checkpoint with transformers: model.save_pretrained(folder)",
        )
