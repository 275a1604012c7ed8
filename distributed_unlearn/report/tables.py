"""Terminal tables from plain data: methods side by side, the steps of a round, a plan."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from distributed_unlearn.records import RoundRecord, SetScores, StepRecord

WIDE = 100
"""Columns of a terminal from which on a comparison has a line for each method."""
SETS = ("forget", "retain", "holdout")
"""The three sets of every comparison, in the order in which all tables and figures show them."""


@dataclass(frozen=True)
class MethodRow:
    """One model in a comparison. The retrained reference is the first row whose name starts with `retrained`."""

    name: str
    scores: dict[str, SetScores]
    """By set: `forget`, `retain`, `holdout`; missing ones show as a dash."""
    tug_of_war: float | None
    wall_seconds: float | None
    num_products: int | None
    note: str = ""


def number(value: float | int | None, digits: int = 4) -> str:
    """`value` with `digits` significant digits for a table cell, without exponent from 1e-3 to 1e5; None is a dash."""
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    if value == 0.0 or not math.isfinite(value):
        return f"{value:g}"
    if not 1e-3 <= abs(value) < 1e5:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def comparison_cells(rows: Sequence[MethodRow]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the method comparison, as text; the terminal and the HTML page both show these."""
    header = ["method", *(f"{name} loss" for name in SETS), *(f"{name} memorised" for name in SETS)]
    header += ["ToW", "seconds", "products", "note"]
    body = []
    for row in rows:
        scores = [row.scores.get(name) for name in SETS]
        cells = [row.name]
        cells += ["–" if found is None else f"{found.loss_nats_per_token:.3f}" for found in scores]
        cells += ["–" if found is None else f"{found.exact_memorisation:.3f}" for found in scores]
        cells.append("–" if row.tug_of_war is None else f"{row.tug_of_war:.3f}")
        cells.append("–" if row.wall_seconds is None else f"{row.wall_seconds:.1f}")
        cells += [number(row.num_products), row.note]
        body.append(cells)
    return header, body


def step_cells(steps: Sequence[StepRecord]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the step table, as text."""
    header = ["step", "loss", "||g||", "alpha", "gamma", "M", "||Delta||", "predicted", "actual", "ratio", "accepted"]
    header += ["rejections", "products", "result", "seconds"]
    body = []
    for step in steps:
        cells = [
            str(step.step + 1),
            number(step.loss),
            number(step.gradient_norm),
            number(step.alpha),
            number(step.gamma),
        ]
        cells += [number(step.cubic_coefficient), number(step.update_norm), number(step.predicted_reduction)]
        cells += [number(step.actual_reduction), number(step.acceptance_ratio), "yes" if step.accepted else "no"]
        cells += [str(step.num_rejections), str(step.num_products), step.result, f"{step.wall_seconds:.1f}"]
        body.append(cells)
    return header, body


def round_cells(record: RoundRecord) -> list[list[str]]:
    """Set, loss and exact memorisation before and after the round, as text."""
    body = []
    for name in record.after:
        before, after = record.before.get(name), record.after[name]
        cells = [name.replace("_", " "), str(after.num_records)]
        cells += ["–" if before is None else f"{before.loss_nats_per_token:.3f}", f"{after.loss_nats_per_token:.3f}"]
        cells += ["–" if before is None else f"{before.exact_memorisation:.3f}", f"{after.exact_memorisation:.3f}"]
        body.append(cells)
    return body


ROUND_HEADER = ("set", "records", "loss before", "loss after", "memorised before", "memorised after")


def erased_text(num_records: int, num_not_in_data: int) -> str:
    """How many records earlier jobs erased, and what became of them here."""
    text = f"erased before: {num_records}, in no retain, holdout or training set"
    return f"{text} ({num_not_in_data} of them not in this data)" if num_not_in_data else text


def round_summary(record: RoundRecord) -> str:
    """One line: what was asked, how long it took, why it ended."""
    parts = [
        f"round {record.round_index + 1}: {record.num_forget_records} to forget, {record.num_retain_records} retained"
    ]
    parts.append(f"{record.num_steps} steps, {record.num_products} products, {record.wall_seconds:.1f} s")
    parts.append(f"update norm {number(record.update_norm)}, stopped: {record.stop_reason}")
    if record.holdout_loss_nats_per_token is not None:
        parts.append(f"holdout loss {record.holdout_loss_nats_per_token:.3f} nats per token")
    if record.tug_of_war is not None:
        parts.append(f"ToW {record.tug_of_war:.3f}")
    return "; ".join(parts)


def _table(title: str, header: Sequence[str], body: Sequence[Sequence[str]], caption: str | None = None) -> Table:
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for index, name in enumerate(header):
        left = index == 0 or name in ("set", "note", "result", "unit", "why", "unit, why")
        table.add_column(name, justify="left" if left else "right")
    for cells in body:
        table.add_row(*(cell.replace("[", r"\[") for cell in cells))  # a name in brackets is no rich markup
    return table


def comparison_table(rows: Sequence[MethodRow], width: int) -> Table:
    """Methods side by side: loss and exact memorisation on the three sets, Tug-of-War, seconds, curvature products.

    On fewer than `WIDE` columns each method takes a line for each set. Notes follow the table as footnotes.
    """
    _, cells = comparison_cells(rows)
    notes = [f"[{index}] {row.note}" for index, row in enumerate((row for row in rows if row.note), start=1)]
    numbered = iter(range(1, len(notes) + 1))
    names = [f"{row.name} [{next(numbered)}]" if row.note else row.name for row in rows]
    caption = (
        "Each set: loss in nats per answer token / share of answer tokens memorised. ToW (Tug-of-War): closeness to "
        "the retrained model, 1 is best."
    )
    body: list[list[str]] = []
    for name, (_, *numbers, tug, seconds, products, _) in zip(names, cells, strict=True):
        pairs = [f"{loss} / {share}" for loss, share in zip(numbers[:3], numbers[3:], strict=True)]
        if width >= WIDE:
            body.append([name, *pairs, tug, seconds, products])
        else:
            rest = [[tug, seconds, products], [""] * 3, [""] * 3]
            labels = [name, "", ""]
            body += [[labels[i], SETS[i], pairs[i], *rest[i]] for i in range(len(SETS))]
    header = ["method", *SETS] if width >= WIDE else ["method", "set", "loss / mem."]
    text = "\n".join([caption, *(note.replace("[", r"\[") for note in notes)])
    return _table("Comparison", [*header, "ToW", "seconds", "products"], body, text)


def facts_table(title: str, header: tuple[str, str, str], rows: Sequence[tuple[str, str, str]]) -> Table:
    """Three columns, e.g. quantity, value, and unit or reason: what a job would do, or what a check found."""
    return _table(title, header, rows)
