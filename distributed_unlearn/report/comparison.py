"""A comparison as numbers and tables: each method's mean and spread over its seeds, round by round."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from distributed_unlearn.records import SetScores
from distributed_unlearn.records.comparison import Cell, CellRound, Comparison
from distributed_unlearn.report.tables import SETS, number


@dataclass(frozen=True)
class Spread:
    """A quantity over seeds."""

    mean: float
    deviation: float | None
    """Sample standard deviation; None of a single seed."""
    low: float
    high: float


@dataclass(frozen=True)
class MethodSummary:
    """A method over its seeds; tuples have an entry a round."""

    num_seeds: int
    """That ended with a result."""
    failures: tuple[str, ...]
    tug_of_war: tuple[Spread | None, ...]
    memorised: tuple[dict[str, Spread], ...]
    """By set: the share of answer tokens (of a classifier: records) predicted."""
    losses: tuple[dict[str, Spread], ...]
    """By set, nats per token."""
    update_norm: tuple[Spread, ...]
    wall_seconds: tuple[Spread, ...]
    num_steps: tuple[Spread, ...]
    num_products: tuple[Spread, ...]


def spread(values: Sequence[float | None]) -> Spread | None:
    """Of what was measured; None where nothing was."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known:
        return None
    deviation = statistics.stdev(known) if len(known) > 1 else None
    return Spread(statistics.fmean(known), deviation, min(known), max(known))


def method_summaries(comparison: Comparison) -> dict[str, MethodSummary]:
    """Every method of a comparison by its label, in the order of the comparison."""
    return {label: _summary(comparison, label) for label in comparison.labels}


def last_round(found: MethodSummary) -> dict[str, float | int | None]:
    """A method after its last round, in a few numbers: means over seeds; None where nothing was measured."""
    tug_of_war = found.tug_of_war[-1] if found.tug_of_war else None
    known = {
        "tug_of_war": None if tug_of_war is None else tug_of_war.mean,
        "tug_of_war_deviation": None if tug_of_war is None else tug_of_war.deviation,
        "update_norm": found.update_norm[-1].mean if found.update_norm else None,
        "wall_seconds": sum(item.mean for item in found.wall_seconds) if found.wall_seconds else None,
        "num_products": sum(item.mean for item in found.num_products) if found.num_products else None,
    }
    return {"num_seeds": found.num_seeds, "num_failures": len(found.failures), **known}


def _summary(comparison: Comparison, label: str) -> MethodSummary:
    cells = comparison.of(label)
    by_round = list(zip(*(cell.rounds for cell in cells), strict=True))
    failures = [cell.failure for cell in comparison.cells if cell.label == label and cell.failure is not None]
    return MethodSummary(
        num_seeds=len(cells),
        failures=tuple(failures),
        tug_of_war=tuple(spread([item.tug_of_war for item in of]) for of in by_round),
        memorised=tuple(_of_sets(of, "exact_memorisation") for of in by_round),
        losses=tuple(_of_sets(of, "loss_nats_per_token") for of in by_round),
        update_norm=_measured([[item.update_norm for item in of] for of in by_round]),
        wall_seconds=_measured([[item.wall_seconds for item in of] for of in by_round]),
        num_steps=_measured([[item.num_steps for item in of] for of in by_round]),
        num_products=_measured([[item.num_products for item in of] for of in by_round]),
    )


def _of_sets(items: Sequence[CellRound], quantity: str) -> dict[str, Spread]:
    found = {}
    for name in SETS:
        values = [getattr(item.scores[name], quantity) for item in items if name in item.scores]
        over_seeds = spread(values)
        if over_seeds is not None:
            found[name] = over_seeds
    return found


def _measured(rows: Sequence[Sequence[float]]) -> tuple[Spread, ...]:
    found = (spread(row) for row in rows)
    return tuple(item for item in found if item is not None)


# -- the table --------------------------------------------------------------------------------------------

HEADER = ("method", "ToW", *(f"{name} memorised" for name in SETS), "update norm", "products", "seconds", "note")


def table_cells(comparison: Comparison) -> list[list[str]]:
    """A row for the original, the reference, the reference trained once more, and each method after its last round.

    Products and seconds are sums over the rounds; `a ± b` is mean and standard deviation over the seeds.
    """
    rows = []
    cells = [cell for cell in comparison.cells if cell.before]
    if cells:
        seconds = comparison.original_seconds
        rows.append(
            _model_row("original", comparison.original_tug_of_war, cells[0].before, seconds, "before all rounds")
        )
    last = comparison.num_rounds - 1
    for item in comparison.references:
        if item.round_index == last:
            is_first = item.tug_of_war is None
            name = "retrained" if is_first else f"retrained, seed {item.seed}"
            note = "the reference" if is_first else "how near two retrained models are"
            rows.append(_model_row(name, 1.0 if is_first else item.tug_of_war, item.scores, item.wall_seconds, note))
    rows += [_method_row(comparison, label, found) for label, found in method_summaries(comparison).items()]
    return rows


def _model_row(
    name: str, tug_of_war: float | None, scores: dict[str, SetScores], seconds: float | None, note: str
) -> list[str]:
    shares = ["–" if key not in scores else f"{scores[key].exact_memorisation:.3f}" for key in SETS]
    tow = "–" if tug_of_war is None else f"{tug_of_war:.3f}"
    return [name, tow, *shares, "–", "–", "–" if seconds is None else f"{seconds:.1f}", note]


def _method_row(comparison: Comparison, label: str, found: MethodSummary) -> list[str]:
    notes = list(dict.fromkeys(found.failures))
    if not found.num_seeds:
        return [label, *["–"] * 7, "no result: " + "; ".join(notes)]
    shares = [found.memorised[-1].get(name) for name in SETS]
    cells = comparison.of(label)
    if notes:
        notes[0] = (
            f"{len(found.failures)} of {len(found.failures) + found.num_seeds} seeds without a result: {notes[0]}"
        )
    return [
        label,
        _shown(found.tug_of_war[-1]),
        *map(_shown, shares),
        number(found.update_norm[-1].mean, 3),
        number(round(_total(cells, "num_products"))),
        f"{_total(cells, 'wall_seconds'):.1f}",
        "; ".join(notes),
    ]


def _total(cells: Sequence[Cell], quantity: str) -> float:
    """Over the rounds, mean over the seeds."""
    return statistics.fmean(sum(getattr(item, quantity) for item in cell.rounds) for cell in cells)


def _shown(value: Spread | None) -> str:
    if value is None:
        return "–"
    return f"{value.mean:.3f}" if value.deviation is None else f"{value.mean:.3f} ± {value.deviation:.3f}"


def cells_table(comparison: Comparison) -> Table:
    """The table for a terminal; notes follow as footnotes."""
    rows = table_cells(comparison)
    notes = list(dict.fromkeys(row[-1] for row in rows if row[-1]))
    numbered = [[f"{row[0]} [{notes.index(row[-1]) + 1}]" if row[-1] else row[0], *row[1:-1]] for row in rows]
    caption = [f"After round {comparison.num_rounds}. ToW (Tug-of-War): closeness to the retrained model, 1 is best."]
    caption += [f"[{index}] {note}" for index, note in enumerate(notes, start=1)]
    text = "\n".join(line.replace("[", r"\[") for line in caption)
    table = Table(title="Comparison", caption=text, title_justify="left", caption_justify="left")
    for index, name in enumerate(HEADER[:-1]):
        table.add_column(name.replace(" memorised", "\nmemorised"), justify="left" if index == 0 else "right")
    for row in numbered:
        table.add_row(*(cell.replace("[", r"\[") for cell in row))
    return table
