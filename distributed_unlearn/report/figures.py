"""PNG figures: methods side by side, and the course of alpha, gamma, M and the losses over the steps."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from distributed_unlearn.records import StepRecord
from distributed_unlearn.report.progress import forget_distance
from distributed_unlearn.report.tables import SETS, MethodRow

# Okabe and Ito (2008): distinguishable with every common form of colour blindness.
BLUE, ORANGE, GREEN, VERMILION, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#555555"
SET_COLOURS = {"forget": VERMILION, "retain": BLUE, "holdout": ORANGE}
SET_HATCHES = {"forget": "", "retain": "//", "holdout": ".."}


def find_retrained(rows: Sequence[MethodRow]) -> MethodRow | None:
    """The reference among the rows: the first whose name starts with `retrained`."""
    return next((row for row in rows if row.name.lower().startswith("retrained")), None)


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)  # Agg explicitly: works without a display and leaves pyplot's global state alone
    figure.savefig(path, dpi=150, facecolor="white")


def _memorisation_panel(axes: Axes, rows: Sequence[MethodRow]) -> None:
    width = 0.26
    for index, name in enumerate(SETS):
        where = [(i + (index - 1) * width, row.scores[name]) for i, row in enumerate(rows) if name in row.scores]
        bars = axes.bar(
            [x for x, _ in where],
            [score.exact_memorisation for _, score in where],
            width,
            label=name,
            color=SET_COLOURS[name],
            hatch=SET_HATCHES[name],
            edgecolor="white",
            linewidth=0.5,
        )
        for text in axes.bar_label(bars, fmt="%.2f", fontsize=7, padding=2):
            text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.4, "alpha": 0.85})  # over dashed lines
    retrained = find_retrained(rows)
    if retrained is not None:
        for name in SETS:
            if name in retrained.scores:
                level = retrained.scores[name].exact_memorisation
                axes.axhline(level, color=SET_COLOURS[name], linestyle="--", linewidth=1.2, zorder=0.5)
    axes.set_ylabel("exact memorisation\n(share of answer tokens)")
    dashed = "" if retrained is None else "; dashed: level of the retrained model"
    axes.set_title(f"What each model still knows{dashed}", fontsize=10, loc="left", pad=24)
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 0.995), ncols=3, frameon=False, fontsize=8, borderaxespad=0.2)


def _tow_panel(axes: Axes, rows: Sequence[MethodRow]) -> None:
    values = [row.tug_of_war for row in rows]
    for index, value in enumerate(values):
        if value is None:
            axes.text(index, 0.02, "not\nmeasured", ha="center", va="bottom", fontsize=7, color=GREY)
        else:
            axes.bar_label(axes.bar(index, value, 0.6, color=GREEN), fmt="%.2f", fontsize=8, padding=1)
    axes.axhline(1.0, color=GREY, linestyle="--", linewidth=1.0, zorder=0.5)
    axes.set_ylabel("Tug-of-War (1 = as retrained)")
    axes.set_title("Closeness to the retrained model", fontsize=10, loc="left", pad=24)


def comparison_figure(rows: Sequence[MethodRow], path: Path) -> None:
    """Write a PNG: exact memorisation on forget, retain, holdout per method, and the Tug-of-War.

    Dashed lines are the levels of the retrained model, the first row whose name starts with `retrained`.
    """
    has_tow = any(row.tug_of_war is not None for row in rows)
    width = 2.2 + 1.25 * len(rows) * (1.6 if has_tow else 1.0)
    figure = Figure(figsize=(max(8.0, width), 4.2), layout="constrained")
    panels = figure.subplots(1, 2 if has_tow else 1, squeeze=False, width_ratios=[1.7, 1.0] if has_tow else [1.0])[0]
    _memorisation_panel(panels[0], rows)
    if has_tow:
        _tow_panel(panels[1], rows)
    for axes in panels:
        axes.set_xticks(range(len(rows)), [row.name.replace(" ", "\n").replace("_", "_\n") for row in rows], fontsize=8)
        axes.set_xlim(-0.6, len(rows) - 0.4)
        axes.set_ylim(0.0, 1.1)
        axes.set_yticks([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
        _tidy(axes)
    _save(figure, path)


def _plot(axes: Axes, steps: Sequence[StepRecord], curve: "Curve") -> None:
    """One line over accepted and rejected steps alike; rejected ones get a cross instead of the marker."""
    label, colour, marker, values = curve
    kept = [(s, value) for s, value in zip(steps, values, strict=True) if value is not None and math.isfinite(value)]
    axes.plot([step.step for step, _ in kept], [value for _, value in kept], color=colour, linewidth=1.3, label=label)
    for accepted, style in ((True, marker), (False, "x")):
        points = [(step.step, value) for step, value in kept if step.accepted is accepted]
        size = 8.0 if not accepted else 6.0 if marker == "s" else 3.5
        line = axes.plot([x for x, _ in points], [y for _, y in points], style, color=colour, markersize=size)[0]
        line.set_markeredgewidth(1.0 if accepted else 2.0)
        if marker == "s":
            line.set_markerfacecolor("none")  # a second curve on top of this one stays visible


def _scale(axes: Axes, values: Sequence[float | None]) -> None:
    """Logarithmic over more than a decade of positive values; symmetric-logarithmic where a few dwarf the others.

    A rejected step can make the objective worse by orders of magnitude, next to which all others would look like zero.
    """
    finite = [abs(value) for value in values if value is not None and math.isfinite(value)]
    positive = all(value is None or value > 0.0 or not math.isfinite(value) for value in values)
    if not finite:
        return
    if positive and max(finite) > 10.0 * min(finite):
        axes.set_yscale("log")
        few_decades = max(finite) < 200.0 * min(finite)
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if few_decades else (1.0,)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif not positive and max(finite) > 20.0 * statistics.median(finite) > 0.0:
        axes.set_yscale("symlog", linthresh=statistics.median(finite))
        axes.yaxis.set_major_formatter("{x:.2g}")


Curve = tuple[str, str, str, list[float | None]]
"""Label, colour, marker, one value per step."""


def _panels(steps: Sequence[StepRecord]) -> list[tuple[str, str, list[Curve]]]:
    """Title, unit and curves of every panel for which the solver has any value."""
    distance = [forget_distance(step.terms) for step in steps]
    step_size: list[Curve] = [("alpha (dual variable)", ORANGE, "s", [step.alpha for step in steps])]
    applied = [step.update_norm if step.accepted else None for step in steps]
    step_size.append(("||Delta|| applied", BLUE, "o", applied))
    reductions: list[Curve] = [("predicted", ORANGE, "s", [step.predicted_reduction for step in steps])]
    reductions.append(("actual", BLUE, "o", [step.actual_reduction for step in steps]))
    everything: list[tuple[str, str, list[Curve]]] = [
        ("Objective at the start of the step", "nats per token", [("loss", BLUE, "o", [s.loss for s in steps])]),
        ("Distance of forget from holdout", "nats per token", [("forget distance", VERMILION, "o", distance)]),
        ("Length of the step", "parameter units", step_size),
        ("Implied damping gamma = M alpha / 2", "curvature units", [("gamma", GREEN, "o", [s.gamma for s in steps])]),
        ("Cubic coefficient M", "loss / length³", [("M", GREEN, "o", [s.cubic_coefficient for s in steps])]),
        ("Reduction of the objective", "nats per token", reductions),
    ]
    shown = []
    for title, unit, curves in everything:
        present = [curve for curve in curves if any(value is not None for value in curve[3])]
        if present:
            shown.append((title, unit, present))
    return shown


def draw_steps(steps: Sequence[StepRecord]) -> Figure:
    """Loss, forget distance, step length and alpha, gamma, M, predicted and actual reduction over the steps.

    Steps that were rejected for good carry a cross. Panels without any value (a first-order solver has no alpha) and
    values that are not finite are left out.
    """
    panels = _panels(steps)
    num_columns = min(3, max(1, len(panels)))
    num_rows = max(1, math.ceil(len(panels) / num_columns))
    figure = Figure(figsize=(4.0 * num_columns, 2.8 * num_rows + 0.3), layout="constrained")
    grid = figure.subplots(num_rows, num_columns, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (title, unit, curves) in zip(grid.flat, panels, strict=False):
        for curve in curves:
            _plot(axes, steps, curve)
        _scale(axes, [value for curve in curves for value in curve[3]])
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_ylabel(unit, fontsize=9)
        axes.set_xlabel("step", fontsize=9)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if len(curves) > 1:
            axes.legend(frameon=False, fontsize=8)
        _tidy(axes)
    num_rejected = sum(not step.accepted for step in steps)
    if num_rejected:
        figure.suptitle(f"cross: step rejected for good ({num_rejected} of {len(steps)})", fontsize=9, color=GREY)
    return figure


def steps_figure(steps: Sequence[StepRecord], path: Path) -> None:
    """Write `draw_steps(steps)` as a PNG; its folder is created."""
    _save(draw_steps(steps), path)
