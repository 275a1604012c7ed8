"""What is written beside a result: the record, the figures, the page, the model card's lines."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from distributed_unlearn.config import JobConfig, ModelConfig
from distributed_unlearn.data.encoding import EncodedCorpus
from distributed_unlearn.data.prepare import PreparedData
from distributed_unlearn.files import expand_home, write_json, write_private
from distributed_unlearn.provenance import Mark, hash_folder, hash_ids, hash_salt, new_salt, package_versions
from distributed_unlearn.records import RoundRecord
from distributed_unlearn.report.figures import steps_figure
from distributed_unlearn.report.page import write_page
from distributed_unlearn.report.tables import MethodRow

SURVIVAL_WARNING_LEVEL = 0.9
"""Share of the update below which the saved dtype counts as having undone part of the unlearning."""


def result_papers(folder: Path) -> tuple[Path, ...]:
    """The files in an output folder that tell of its checkpoint, the record last; see `set_aside`."""
    return folder / "record.salt", folder / "report.html", folder / "record.json"


@dataclass(frozen=True)
class Origin:
    """What a result is made from and with, taken before the first step: afterwards both may have changed."""

    base: dict[str, Any]
    versions: dict[str, str | None]
    result: str = field(default_factory=new_salt)
    """Number of the result, in its record and in the mark inside its checkpoint."""


def find_origin(model: ModelConfig, commit: str | None) -> Origin:
    """Hashes of the base checkpoint's own files, or the commit of a hub model; and the installed versions."""
    folder = Path(expand_home(model.path))
    files = hash_folder(folder, below=False) if folder.is_dir() else None
    base = {"path": model.path, "revision": commit or model.revision, "files": files}
    return Origin(base, package_versions())


def model_to_open(model: ModelConfig, commit: str | None) -> ModelConfig:
    """The checkpoint as the workers open it: `~` expanded, and a hub branch at the commit where it was found."""
    return model.model_copy(update={"path": expand_home(model.path), "revision": commit or model.revision})


def result_mark(origin: Origin, prepared: PreparedData, erased: Sequence[np.ndarray]) -> Mark:
    """The mark of a result from which the records `erased` are gone, beside those that went before."""
    return Mark(origin.result, prepared.erased.num_after(erased))


def redacted_config(job: JobConfig) -> dict[str, Any]:
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


def erased_hashes(corpus: EncodedCorpus, rounds: Sequence[np.ndarray], salt: str) -> list[list[str]]:
    """Salted hashes of the ids that each round erased."""
    return [hash_ids((corpus.record_ids[int(index)] for index in forget), salt) for forget in rounds]


def erasure_fields(prepared: PreparedData, erased: Sequence[np.ndarray]) -> tuple[dict[str, Any], str | None]:
    """What a record says of this and every earlier erasure, and the salt of its hashes; None without any.

    The salt of the checkpoint that the job went on from is used again, so that its hashes can be handed on as they are.
    """
    before = prepared.erased
    salt = before.salt or (new_salt() if len(erased) else None)
    fields = {
        "parent": before.parent,
        "num_erased_before": before.num_records,
        "num_erased_before_not_in_data": before.num_unknown,
        "erased_before_sha256_salted": [list(hashes) for hashes in before.hashes],
        "erased_ids_sha256_salted": [] if salt is None else erased_hashes(prepared.corpus, erased, salt),
        "salt_sha256": None if salt is None else hash_salt(salt),
    }
    return fields, salt


def erased_before(prepared: PreparedData) -> str | None:
    """How many records earlier jobs erased; None without any."""
    erased = prepared.erased
    if not erased.hashes and not erased.num_unknown_subjects:
        return None
    text = f"erased before: {erased.num_records}, in no retain, holdout or training set"
    if erased.num_unknown:
        text += f" ({erased.num_unknown} of them not in this data)"
    if erased.num_unknown_subjects:
        text += f"; the data holds no record of {erased.num_unknown_subjects} subject(s) of data.erased"
    return text


def card_lines(rounds: Sequence[RoundRecord], survival: Any, prepared: PreparedData) -> list[str]:
    """Counts and scalars for the model card."""
    lines = [
        f"Round {record.round_index}: {record.num_forget_records} records erased, "
        f"{record.num_retain_records} retained, {record.num_steps} steps, {record.num_products} curvature "
        f"products, update norm {record.update_norm:.4g}."
        for record in rounds
    ]
    if (before := erased_before(prepared)) is not None:
        lines.insert(0, f"Records {before}.")
    lines.append(
        f"Share of the update that survives {survival.dtype}: {survival.projection:.4f} "
        f"({survival.share_of_changed_weights:.1%} of the weights changed)."
    )
    return lines


def write_result_record(
    folder: Path,
    job: JobConfig,
    origin: Origin,
    prepared: PreparedData,
    rounds: Sequence[RoundRecord],
    survival: Any,
    files: dict[str, str],
    mode: Any,
    reference: dict[str, Any] | None,
) -> None:
    """Write record.salt, which only the owner can read, then record.json.

    The salt proves to its holder that a given id was erased; without it the record tells no ids. It comes first:
    a salt without a record is of no use, and a record without its salt proves nothing.
    """
    forget = prepared.partition.forget_rounds
    erasure, salt = erasure_fields(prepared, forget)
    assert salt is not None
    record = {
        "format": 1,
        "config": redacted_config(job),
        "versions": origin.versions,
        "base": origin.base,
        "result": {"id": origin.result, "files": files},
        **erasure,
        "num_retain_records": len(prepared.partition.retain(len(forget) - 1)),
        "rounds": [asdict(item) for item in rounds],
        "surviving_update": asdict(survival),
        "curvature_mode": asdict(mode),
        "retrained": reference,
    }
    write_private(folder / "record.salt", salt)
    write_json(folder / "record.json", finite(record))


def finite(value: Any) -> Any:
    """`value` with NaN and infinity as null: JSON has neither."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


def write_pictures(
    folder: Path, title: str, counts: str, rounds: Sequence[RoundRecord], rows: Sequence[MethodRow]
) -> None:
    """Draw the course of every round and write one page with tables and pictures; an earlier run's pictures go."""
    for old in folder.glob("steps_round_*.png"):
        old.unlink()
    images = []
    for record in rounds:
        path = folder / f"steps_round_{record.round_index}.png"
        steps_figure(record.steps, path)
        images.append(path)
    paragraphs = [counts, *(record.stop_reason for record in rounds)]
    write_page(folder / "report.html", title, paragraphs, rows, rounds, images)
