"""What of a job may be handed to a cluster's job server, which keeps it for everybody who may list jobs.

Ray keeps a submitted job's package, entrypoint and metadata, and shows them. So a job that travels names people and
records in files alone, and every file by an absolute path, which is the same on every node.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from distributed_unlearn.config.base import StrictModel
from distributed_unlearn.config.job import JobConfig
from distributed_unlearn.errors import ConfigError

ID_KEYS = ("subjects", "record_ids")
PATH_KEYS = ("path", "ids_file", "base_model", "retrained", "output")
_HUB_KEYS = ("path", "base_model", "retrained")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?|sklearn:\w+", re.ASCII)
_FILE_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt", ".yaml", ".safetensors")


def fields(section: StrictModel, place: str = "") -> Iterator[tuple[str, str, Any]]:
    """(dotted place, key, value) of every value of a configuration that is no section itself."""
    for key in type(section).model_fields:
        value, where = getattr(section, key), f"{place}.{key}".lstrip(".")
        for item in value if isinstance(value, tuple) and value and isinstance(value[0], BaseModel) else (value,):
            if isinstance(item, StrictModel):
                yield from fields(item, where)
            else:
                yield where, key, item


def inline_ids(job: JobConfig) -> list[str]:
    """The keys of a job that hold ids of people or records as they are, dotted; never the ids."""
    return sorted({place for place, key, value in fields(job) if key in ID_KEYS and value})


def ids_files(job: JobConfig) -> list[Path]:
    """The files with ids that a job names."""
    return [Path(value) for _, key, value in fields(job) if key == "ids_file" and value is not None]


def require_fit_for_cluster(job: JobConfig) -> None:
    """Refuse what would mean something else, or nothing, on the nodes of a cluster.

    Raises:
        ConfigError: a path that is not absolute, or a cluster that the job names itself.
    """
    relative = sorted({place for place, key, value in fields(job) if _is_relative(key, value)})
    if relative:
        raise ConfigError(
            f"path(s) that are not absolute in a job for a cluster: {', '.join(relative)}",
            "absolute paths on storage that every node sees under the same name, or names on the Hub",
            "e.g. output=/mnt/shared/runs/first",
        )
    if job.cluster.address:
        raise ConfigError(
            "cluster.address in a job for a job server",
            "none: a submitted job finds the cluster that it runs in",
            "remove it; --address is the job server's",
        )


def _is_relative(key: str, value: Any) -> bool:
    if key not in PATH_KEYS or value is None:
        return False
    return any(not Path(text).is_absolute() and not _names_hub(key, text) for text in _texts(value))


def _texts(value: Any) -> tuple[str, ...]:
    return value if isinstance(value, tuple) else (value,)


def _names_hub(key: str, text: str) -> bool:
    """Whether a text that is no absolute path can only be a name on the Hub: not a file's, nor a folder's here."""
    if key not in _HUB_KEYS or not _HUB_NAME.fullmatch(text) or text.startswith("."):
        return False
    return not text.endswith(_FILE_SUFFIXES) and not Path(text).exists()
