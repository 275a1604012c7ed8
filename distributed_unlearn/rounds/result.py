"""What is written beside a checkpoint: the record and the salt; and in it: the mark and the lines of its card."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from distributed_unlearn.data.erased import ErasedBefore
from distributed_unlearn.provenance import Mark, hash_ids, hash_salt, new_salt
from distributed_unlearn.records import (
    RECORD_NAME,
    ResultFiles,
    RoundRecord,
    RunRecord,
    SurvivingUpdate,
    run_verdict,
)
from distributed_unlearn.report.tables import erased_text
from distributed_unlearn.rounds.origin import redacted_config
from distributed_unlearn.rounds.preparation import PreparedRun


def result_papers(folder: Path) -> tuple[Path, ...]:
    """The files in an output folder that tell of its checkpoint, the record last; see `set_aside`."""
    return folder / "record.salt", folder / "report.html", folder / RECORD_NAME


def result_mark(run: PreparedRun, erased: Sequence[np.ndarray]) -> Mark:
    """The mark of a result from which the records `erased` are gone, beside those that went before."""
    return Mark(run.origin.result_id, run.data.erased.num_after(erased))


def begin_record(
    kind: Literal["unlearning", "training"], run: PreparedRun, files: dict[str, str], erased: Sequence[np.ndarray]
) -> tuple[RunRecord, str | None]:
    """What a record says of where a result comes from and of every erasure so far; the salt of its hashes, if any.

    The salt of the checkpoint that the job went on from is used again, so that its hashes can be handed on as they are.

    Args:
        kind: Of the job.
        run: The job.
        files: Hashes of the checkpoint's files.
        erased: The records that each round of this job erased.
    """
    before, origin, rounds = run.data.erased, run.origin, run.data.partition.forget_rounds
    salt = before.salt or (new_salt() if len(erased) else None)
    ids = run.data.corpus.record_ids
    hashes = () if salt is None else tuple(tuple(hash_ids((ids[int(i)] for i in part), salt)) for part in erased)
    record = RunRecord(
        kind=kind,
        started_at=origin.started_at,
        config=redacted_config(run.job),
        versions=origin.versions,
        base=origin.base,
        result=ResultFiles(origin.result_id, files),
        num_retain_records=len(run.data.partition.retain(len(rounds) - 1)) if rounds else None,
        num_erased_before=before.num_records,
        num_erased_before_not_in_data=before.num_unknown,
        parent=before.parent,
        salt_sha256=None if salt is None else hash_salt(salt),
        erased_before_sha256_salted=before.hashes,
        erased_ids_sha256_salted=hashes,
    )
    return record, salt


def card_lines(rounds: Sequence[RoundRecord], survival: SurvivingUpdate, before: ErasedBefore) -> list[str]:
    """The verdict, then counts and scalars, for the model card."""
    lines = list(run_verdict(rounds[-1].verdict, survival).sentences)
    if before.hashes:
        lines.append(f"Records {erased_text(before.num_records, before.num_unknown)}.")
    lines += [
        f"Round {record.round_index + 1}: {record.num_forget_records} records asked to be erased, "
        f"{record.num_retain_records} to be retained, {record.num_steps} steps, {record.num_products} curvature "
        f"products, update norm {record.update_norm:.4g}; {record.verdict.words}."
        for record in rounds
    ]
    if survival.update_norm > 0:
        lines.append(
            f"Share of the update that survives {survival.dtype}: {survival.projection:.4f} "
            f"({survival.share_of_changed_weights:.1%} of the weights changed)."
        )
    else:
        lines.append("No weight changed.")
    return lines
