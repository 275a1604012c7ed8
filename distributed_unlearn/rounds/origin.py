"""What a result is made from and with, taken before the first step: afterwards both may have changed."""

from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from distributed_unlearn.config import AdapterFolder, JobConfig, ModelConfig
from distributed_unlearn.files import expand_home
from distributed_unlearn.models.base_of_adapter import opened_as
from distributed_unlearn.provenance import hash_folder, new_salt, package_versions
from distributed_unlearn.records import BaseCheckpoint


@dataclass(frozen=True)
class Origin:
    """Base checkpoint, versions and time at the start of a run."""

    base: BaseCheckpoint
    versions: dict[str, str | None]
    started_at: str
    """UTC, ISO 8601, to the second."""
    result_id: str = field(default_factory=new_salt)
    """Of the result, in its record and in the mark inside its checkpoint."""


def find_origin(model: ModelConfig, commit: str | None) -> Origin:
    """Hashes of the files that are opened, or the commit of a hub model; and the installed versions.

    Raises:
        ModelError: see `opened_as`.
    """
    opened = opened_as(model)
    paths = {model.path, opened.path} | ({opened.adapter.path} if isinstance(opened.adapter, AdapterFolder) else set())
    found = {path: _own_files(path) for path in sorted(paths)}
    others = {path: files for path, files in found.items() if path != model.path and files is not None}
    base = BaseCheckpoint(model.path, commit or model.revision, found[model.path], others)
    return Origin(base, package_versions(), datetime.now(UTC).isoformat(timespec="seconds"))


def _own_files(path: str) -> dict[str, str] | None:
    """Hashes of a folder's own files; None where there is no folder."""
    folder = Path(expand_home(path))
    return hash_folder(folder, below=False) if folder.is_dir() else None


def model_to_open(model: ModelConfig, commit: str | None) -> ModelConfig:
    """The checkpoint as the workers open it: `~` expanded, and a hub branch at the commit where it was found."""
    return model.model_copy(update={"path": expand_home(model.path), "revision": commit or model.revision})


def redacted_config(job: JobConfig) -> dict[str, object]:
    """The resolved configuration with every selection of people who asked replaced by what kind of selection it was."""
    tree: dict[str, Any] = job.model_dump(mode="json")

    def redact(selection: dict[str, Any] | None) -> dict[str, Any] | None:
        if selection is None:
            return None
        counts = {key: f"{len(value)} named" if isinstance(value, list) else value for key, value in selection.items()}
        # Files of requests are named after those who made them.
        return {**counts, "ids_file": None if selection["ids_file"] is None else "a file"}

    tree["forget"] = redact(tree["forget"])
    tree["data"]["erased"] = redact(tree["data"]["erased"])
    if tree["rounds"] is not None:
        tree["rounds"] = [redact(selection) for selection in tree["rounds"]]
    return tree
