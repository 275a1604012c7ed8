"""Hashes, salts and versions: what shows later which files a result was made from, and which ids it erased."""

import hashlib
import platform
import secrets
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from distributed_unlearn import __version__


def hash_folder(
    folder: Path, suffixes: tuple[str, ...] = (".safetensors", ".json"), below: bool = True
) -> dict[str, str]:
    """SHA-256 of the files with these suffixes, by path relative to the folder; `below`: those of subfolders too."""
    found = {}
    for path in sorted(folder.rglob("*") if below else folder.iterdir()):
        if path.is_file() and path.suffix in suffixes:
            with path.open("rb") as handle:
                found[path.relative_to(folder).as_posix()] = hashlib.file_digest(handle, "sha256").hexdigest()
    return found


def hash_ids(ids: Iterable[str], salt: str) -> list[str]:
    """SHA-256 of `salt`, a zero byte and the id, for each id; sorted, so that the order tells nothing."""
    return sorted(hashlib.sha256(f"{salt}\0{name}".encode()).hexdigest() for name in ids)


def new_salt() -> str:
    """128 random bits in hexadecimal."""
    return secrets.token_hex(16)


def package_versions() -> dict[str, str | None]:
    """Versions of Python, of this code and of the packages that a result depends on; None where one is missing."""
    names = ("torch", "transformers", "deepspeed", "accelerate", "ray", "datasets", "numpy")
    # Our own by hand: where a working_dir carries the code there is no installed distribution to ask.
    own = {"python": platform.python_version(), "distributed-unlearn": __version__}
    return {**own, **{name: _version(name) for name in names}}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
