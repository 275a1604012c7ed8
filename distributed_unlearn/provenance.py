"""Hashes, salts and versions: what shows later which files a result was made from, and which ids it erased.

A result carries the salted hashes of everything that it and the results before it erased, all under one salt that goes
from result to result. So a job needs its parent alone, a folder of an older job may be gone, and the hash of an id that
the data no longer holds can be handed on although nobody here knows the id. A checkpoint carries a mark with the number
of its record, so that it is known as a result of this program wherever it is copied.
"""

import hashlib
import json
import platform
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from distributed_unlearn.errors import ModelError
from distributed_unlearn.version import __version__

MARK = "unlearning.json"
"""The file inside a checkpoint that says that it is a result of this program."""


def hash_folder(
    folder: Path, suffixes: tuple[str, ...] = (".safetensors", ".json"), below: bool = True
) -> dict[str, str]:
    """SHA-256 of the files with these suffixes, by path relative to the folder; `below`: those of subfolders too."""
    found = {}
    for path in sorted(folder.rglob("*") if below else folder.iterdir()):
        if path.is_file() and path.suffix in suffixes:
            found[path.relative_to(folder).as_posix()] = hash_file(path)
    return found


def hash_file(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def hash_ids(ids: Iterable[str], salt: str) -> list[str]:
    """SHA-256 of `salt`, a zero byte and the id, for each id; sorted, so that the order tells nothing."""
    return sorted(hashlib.sha256(f"{salt}\0{name}".encode()).hexdigest() for name in ids)


def new_salt() -> str:
    """128 random bits in hexadecimal."""
    return secrets.token_hex(16)


@dataclass(frozen=True)
class Mark:
    """What a checkpoint says of itself: no ids, and no hashes of ids."""

    result: str
    """128 random bits, also in the record: which record tells of this checkpoint."""
    num_erased: int
    """Records that were erased from it, by its own job and by those before."""

    def write(self, folder: Path) -> None:
        """Put the mark into a checkpoint that is being written."""
        tree = {"format": 1, "result": self.result, "num_erased": self.num_erased}
        (folder / MARK).write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Lineage:
    """What was erased before from a checkpoint, as its record tells it."""

    parent: str | None = None
    """SHA-256 of the checkpoint's `record.json`; None where it has none."""
    salt: str | None = None
    """With which the hashes were made, and with which the next record's are; None where nothing was erased."""
    erased: tuple[tuple[str, ...], ...] = ()
    """Salted hashes of ids, one set for every round of every job so far, the oldest first."""


def read_mark(checkpoint: Path) -> Mark | None:
    """The mark of a checkpoint folder; None where there is none.

    Raises:
        ModelError: a mark that cannot be read.
    """
    path = checkpoint / MARK
    if not path.exists():
        return None
    tree = _read_object(path)
    result, num_erased = tree.get("result"), tree.get("num_erased")
    if not isinstance(result, str) or not isinstance(num_erased, int) or num_erased < 0:
        raise unknown_past(f"'{path}', which does not say which record tells of it and how many records were erased")
    return Mark(result, num_erased)


def read_lineage(checkpoint: Path) -> Lineage:
    """What was erased before from a checkpoint, by the `record.json` and the `record.salt` beside its folder.

    A folder without a mark is somebody else's, and nothing is known to be erased; but one named `checkpoint` beside a
    `record.json` is a result of a version that left no mark.

    Raises:
        ModelError: a result of this program from which records were erased, whose record or salt is missing, cannot be
            read or belongs to another checkpoint.
    """
    checkpoint = checkpoint.resolve()
    mark, path = read_mark(checkpoint), checkpoint.parent / "record.json"
    if mark is None and (checkpoint.name != "checkpoint" or not path.exists()):
        return Lineage()
    if not path.exists():
        assert mark is not None
        if not mark.num_erased:
            return Lineage()
        raise unknown_past(f"a checkpoint from which {mark.num_erased} record(s) were erased, without '{path}'")
    record = _read_object(path)
    if not _tells_of(record, mark, checkpoint):
        if mark is not None and not mark.num_erased:
            return Lineage()
        raise unknown_past(f"'{path}', which tells of another checkpoint than the one beside it")
    parent = hashlib.sha256(path.read_bytes()).hexdigest()
    erased = tuple(_hash_sets(record, path))
    if not any(erased):
        return Lineage(parent)
    return Lineage(parent, _read_salt(record, path.with_name("record.salt")), erased)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise unknown_past(f"'{path}', which cannot be read ({type(error).__name__})") from None
    if not isinstance(tree, dict):
        raise unknown_past(f"'{path}', which is no record")
    return tree


def _tells_of(record: dict[str, Any], mark: Mark | None, checkpoint: Path) -> bool:
    result = record.get("result")
    if not isinstance(result, dict):
        return False
    if mark is not None:
        return result.get("id") == mark.result
    files = result.get("files")  # of a version without marks: the small files are enough to tell two results apart
    mine = hash_folder(checkpoint, suffixes=(".json",))
    return isinstance(files, dict) and bool(mine) and all(files.get(name) == value for name, value in mine.items())


def _hash_sets(record: dict[str, Any], path: Path) -> list[tuple[str, ...]]:
    """Every set of hashes in a record: of the jobs before it, then of its own rounds."""
    sets = [*(record.get(key, []) for key in ("erased_before_sha256_salted", "erased_ids_sha256_salted"))]
    lists = all(isinstance(part, list) and all(isinstance(hashes, list) for hashes in part) for part in sets)
    found = [tuple(hashes) for part in sets for hashes in part] if lists else []
    if not lists or not all(isinstance(name, str) and len(name) == 64 for hashes in found for name in hashes):
        raise unknown_past(f"'{path}', whose list of erased ids is not what this program writes")
    return found


def _read_salt(record: dict[str, Any], path: Path) -> str:
    try:
        salt = path.read_text(encoding="ascii").strip()
    except (OSError, ValueError) as error:
        raise unknown_past(
            f"a checkpoint from which records were erased, whose '{path}' cannot be read ({type(error).__name__})"
        ) from None
    if record.get("salt_sha256") not in (None, hash_salt(salt)):
        raise unknown_past(f"'{path}', which is not the salt of the record beside it")
    return salt


def hash_salt(salt: str) -> str:
    """What a record says of its salt, so that another one is recognised: the hash of an id that no record can have."""
    return hash_ids([""], salt)[0]


def unknown_past(got: str) -> ModelError:
    """The refusal of a checkpoint of which nobody can say what was erased from it."""
    return ModelError(
        got,
        "record.json and record.salt beside the checkpoint: they tell which records were erased and must stay so",
        "put both back beside the checkpoint's folder (a backup, a copy of its whole output folder), or name the "
        "erased records in data.erased",
    )


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
