"""The report of a finished run, drawn from its record alone: tables, pictures, one page."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distributed_unlearn.config import stepping_methods
from distributed_unlearn.evaluation.metrics import tug_of_war
from distributed_unlearn.records import RECORD_NAME, RunRecord, read_record
from distributed_unlearn.report.drawing import Picture
from distributed_unlearn.report.figures import comparison_pictures, steps_pictures
from distributed_unlearn.report.page import Summary, write_page
from distributed_unlearn.report.tables import MethodRow, erased_text

PICTURES = "pictures"
"""The folder of a report's pictures; the page holds them itself."""


@dataclass(frozen=True)
class Report:
    """What was drawn: from which record, with which rows of comparison."""

    record: RunRecord
    rows: list[MethodRow]


def write_report(folder: Path) -> Report:
    """Read the record in `folder`, draw its pictures and write its page; an earlier run's pictures go.

    A training has neither: its page would hold what its record says.

    Raises:
        DataError: no record, or one that cannot be read.
    """
    record = read_record(folder / RECORD_NAME)
    rows = comparison_rows(record)
    named: list[tuple[str, Picture]] = []
    if record.kind == "unlearning":
        comparison = comparison_pictures(rows)
        courses = [(item, steps_pictures(item.steps)) for item in record.rounds]
        named += [("", picture) for picture in comparison]
        named += [(f"round_{item.round_index + 1}_", picture) for item, drawn in courses for picture in drawn]
        write_page(folder / "report.html", summarise_run(record, folder.name), rows, comparison, courses)
    write_pictures(folder, named)
    return Report(record, rows)


def write_pictures(folder: Path, pictures: Sequence[tuple[str, Picture]]) -> None:
    """Write pictures, each with a prefix to its name, in the place of an earlier report's."""
    shutil.rmtree(folder / PICTURES, ignore_errors=True)
    for prefix, picture in pictures:
        (folder / PICTURES).mkdir(exist_ok=True)
        (folder / PICTURES / f"{prefix}{picture.name}.svg").write_text(picture.svg, encoding="utf-8")


def comparison_rows(record: RunRecord) -> list[MethodRow]:
    """Before and after every round, and the retrained reference where there is one."""
    rows: list[MethodRow] = []
    reference = record.retrained
    for item in record.rounds:
        # Each round has a forget and a retain set of its own, so each has a state before it to compare with.
        which = "" if len(record.rounds) == 1 else f" round {item.round_index + 1}"
        before = None
        if reference is not None and item.tug_of_war is not None:
            before = tug_of_war(item.before, reference, tuple(reference))
        rows.append(MethodRow(f"before{which}", item.before, before, None, None))
        rows.append(MethodRow(f"after{which}", item.after, item.tug_of_war, item.wall_seconds, item.num_products))
    if reference is not None:
        rows.append(MethodRow("retrained", reference, 1.0, None, None))
    return rows


def summarise_run(record: RunRecord, name: str) -> Summary:
    """What stands first in the page of an unlearning run."""
    verdict, last = record.verdict, record.rounds[-1]
    num_forget = sum(item.num_forget_records for item in record.rounds)
    in_rounds = "" if len(record.rounds) == 1 else f", in {len(record.rounds)} rounds"
    held = last.after["holdout"].num_records if "holdout" in last.after else 0
    asked = (
        f"Asked: forget {num_forget} record(s){in_rounds}, and keep the {last.num_retain_records} others. "
        f"{held or 'No'} record(s) that the model never saw show how hard unseen data is."
    )
    return Summary(
        f"Unlearning run {name}",
        asked,
        () if verdict is None else verdict.sentences,
        None if verdict is None else verdict.is_good,
        _facts(record),
    )


def _facts(record: RunRecord) -> tuple[tuple[str, str], ...]:
    base, survival = record.base, record.surviving_update
    steps, products = (sum(getattr(item, name) for item in record.rounds) for name in ("num_steps", "num_products"))
    seconds = sum(item.wall_seconds for item in record.rounds)
    method, objective = _setting(record, "solver", "method"), _setting(record, "objective", "name")
    if method in stepping_methods():
        method += f" on the objective {objective}"
    compared = "the model before with the model after"
    if record.retrained is not None:
        compared += f", and both with the retrained model {_setting(record, 'retrained')}"
    facts = [
        ("Model", base.path if base.revision is None else f"{base.path} at {base.revision}"),
        ("Started", f"{record.started_at.replace('T', ' ').removesuffix('+00:00')} UTC"),
        ("Method", f"{method}: {steps} steps, {products} products, {seconds:.1f} s"),
        ("Compared", compared),
    ]
    facts += [(f"Round {item.round_index + 1}", f"{item.verdict.words}; {item.stop_reason}") for item in record.rounds]
    if record.num_erased_before:
        before = erased_text(record.num_erased_before, record.num_erased_before_not_in_data)
        facts.append(("Earlier jobs", before))
    if survival is not None:
        facts.append(("Files", f"{survival.projection:.1%} of the update survives as {survival.dtype}"))
    return tuple(facts)


def _setting(record: RunRecord, *keys: str) -> str:
    """A value of the recorded job."""
    value: object = record.config
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return str(value)
