"""What is written beside a result: the record, the figures, the page, the model card's lines."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from distributed_unlearn.checkpoints import (
    hash_folder,
    hash_ids,
    new_salt,
    package_versions,
    write_json,
    write_private,
)
from distributed_unlearn.config import JobConfig
from distributed_unlearn.data.encoding import EncodedCorpus
from distributed_unlearn.data.selection import Partition
from distributed_unlearn.records import RoundRecord
from distributed_unlearn.report.figures import steps_figure
from distributed_unlearn.report.page import write_page
from distributed_unlearn.report.tables import MethodRow

SURVIVAL_WARNING_LEVEL = 0.9
"""Share of the update below which the saved dtype counts as having undone part of the unlearning."""


def redacted_config(job: JobConfig) -> dict[str, Any]:
    """The resolved configuration with every forget selection replaced by what kind of selection it was."""
    tree: dict[str, Any] = job.model_dump(mode="json")

    def redact(selection: dict[str, Any] | None) -> dict[str, Any] | None:
        if selection is None:
            return None
        return {key: f"{len(value)} named" if isinstance(value, list) else value for key, value in selection.items()}

    tree["forget"] = redact(tree["forget"])
    if tree["rounds"] is not None:
        tree["rounds"] = [redact(selection) for selection in tree["rounds"]]
    return tree


def erased_hashes(corpus: EncodedCorpus, rounds: Sequence[np.ndarray], salt: str) -> list[list[str]]:
    """Salted hashes of the ids that each round erased."""
    return [hash_ids((corpus.record_ids[int(index)] for index in forget), salt) for forget in rounds]


def card_lines(rounds: Sequence[RoundRecord], survival: Any) -> list[str]:
    """Counts and scalars for the model card."""
    lines = [
        f"Round {record.round_index}: {record.num_forget_records} records erased, "
        f"{record.num_retain_records} retained, {record.num_steps} steps, {record.num_products} curvature "
        f"products, update norm {record.update_norm:.4g}."
        for record in rounds
    ]
    lines.append(
        f"Share of the update that survives {survival.dtype}: {survival.projection:.4f} "
        f"({survival.share_of_changed_weights:.1%} of the weights changed)."
    )
    return lines


def write_result_record(
    folder: Path,
    job: JobConfig,
    corpus: EncodedCorpus,
    partition: Partition,
    rounds: Sequence[RoundRecord],
    survival: Any,
    mode: Any,
    reference: dict[str, Any] | None,
) -> None:
    """Write record.json, and record.salt which only the owner can read.

    The salt proves to its holder that a given id was erased; without it the record tells no ids.
    """
    salt, base = new_salt(), Path(job.model.path)
    record = {
        "format": 1,
        "config": redacted_config(job),
        "versions": package_versions(),
        "base": {"path": job.model.path, "revision": job.model.revision, "files": _hashes(base)},
        "result": {"files": hash_folder(folder / "checkpoint")},
        "erased_ids_sha256_salted": erased_hashes(corpus, partition.forget_rounds, salt),
        "rounds": [asdict(item) for item in rounds],
        "surviving_update": asdict(survival),
        "curvature_mode": asdict(mode),
        "retrained": reference,
    }
    write_json(folder / "record.json", finite(record))
    (folder / "record.salt").unlink(missing_ok=True)
    write_private(folder / "record.salt", salt)


def _hashes(folder: Path) -> dict[str, str] | None:
    return hash_folder(folder) if folder.is_dir() else None


def finite(value: Any) -> Any:
    """`value` with NaN and infinity as null: JSON has neither."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


def write_pictures(folder: Path, title: str, rounds: Sequence[RoundRecord], rows: Sequence[MethodRow]) -> None:
    """Draw the course of every round and write one page with tables and pictures; an earlier run's pictures go."""
    for old in folder.glob("steps_round_*.png"):
        old.unlink()
    images = []
    for record in rounds:
        path = folder / f"steps_round_{record.round_index}.png"
        steps_figure(record.steps, path)
        images.append(path)
    write_page(folder / "report.html", title, [record.stop_reason for record in rounds], rows, rounds, images)
