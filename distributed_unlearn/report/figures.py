"""SVG figures: methods side by side, and the course of the losses, alpha, gamma and M over the steps.

Each panel is a picture of its own, narrow enough for a phone; text stays text. With it come a caption, a sentence of
reading help and a text that says the same in words.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from distributed_unlearn.records import StepRecord
from distributed_unlearn.report.drawing import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    VERMILION,
    WIDTH,
    Picture,
    canvas,
    svg_text,
    tidy,
)
from distributed_unlearn.report.progress import forget_distance
from distributed_unlearn.report.tables import SETS, MethodRow, number

SET_COLOURS = {"forget": VERMILION, "retain": BLUE, "holdout": ORANGE}
SET_HATCHES = {"forget": "", "retain": "//", "holdout": ".."}


def find_retrained(rows: Sequence[MethodRow]) -> MethodRow | None:
    """The reference among the rows: the first whose name starts with `retrained`."""
    return next((row for row in rows if row.name.lower().startswith("retrained")), None)


# -- methods side by side ---------------------------------------------------------------------------------


def comparison_pictures(rows: Sequence[MethodRow]) -> list[Picture]:
    """What each model still knows of the three sets, and how close it is to the retrained model where that is known."""
    pictures = [_memorisation(rows)] if rows else []
    if any(row.tug_of_war is not None for row in rows):
        pictures.append(_closeness(rows))
    return pictures


def draw_memorisation(rows: Sequence[MethodRow]) -> Figure:
    """Bars from 0 to 1 for each set of each model; dashed lines at the retrained model's levels."""
    figure, axes = _bars(rows, bars_per_row=3)
    height = 0.26
    for index, name in enumerate(SETS):
        where = [(i + (index - 1) * height, row.scores[name]) for i, row in enumerate(rows) if name in row.scores]
        bars = axes.barh(
            [y for y, _ in where],
            [score.exact_memorisation for _, score in where],
            height,
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
                axes.axvline(level, color=SET_COLOURS[name], linestyle="--", linewidth=1.0, zorder=0.5)
    axes.set_xlabel("share of answer tokens memorised", fontsize=9)
    axes.legend(loc="lower left", bbox_to_anchor=(-0.1, 1.0), ncols=3, frameon=False, fontsize=8)
    return figure


def _memorisation(rows: Sequence[MethodRow]) -> Picture:
    dashed = "" if find_retrained(rows) is None else " Dashed lines are the levels of the retrained model."
    parts = []
    for row in rows:
        shares = [f"{name} {row.scores[name].exact_memorisation:.2f}" for name in SETS if name in row.scores]
        parts.append(f"{row.name}: {', '.join(shares) or 'not measured'}")
    return Picture(
        "memorisation",
        "What each model still knows",
        "A good unlearned model has a short forget bar, about as long as its holdout bar, and a retain bar as long as "
        f"before.{dashed}",
        f"Share of answer tokens memorised. {'; '.join(parts)}.",
        svg_text(draw_memorisation(rows)),
    )


def draw_closeness(rows: Sequence[MethodRow]) -> Figure:
    """A bar for each model's Tug-of-War; dashed at 1."""
    figure, axes = _bars(rows, bars_per_row=1)
    for index, row in enumerate(rows):
        if row.tug_of_war is None:
            axes.text(0.02, index, "not measured", va="center", fontsize=7, color=GREY)
        else:
            axes.bar_label(axes.barh(index, row.tug_of_war, 0.6, color=GREEN), fmt="%.2f", fontsize=8, padding=2)
    axes.axvline(1.0, color=GREY, linestyle="--", linewidth=1.0, zorder=0.5)
    axes.set_xlabel("Tug-of-War", fontsize=9)
    return figure


def _closeness(rows: Sequence[MethodRow]) -> Picture:
    parts = [f"{row.name} {number(row.tug_of_war, 3)}" for row in rows if row.tug_of_war is not None]
    return Picture(
        "closeness",
        "Closeness to the retrained model",
        "The longer the bar, the more the model is like one that was trained without the forgotten records; 1 is "
        "indistinguishable on these sets.",
        f"Tug-of-War. {'; '.join(parts)}.",
        svg_text(draw_closeness(rows)),
    )


def _bars(rows: Sequence[MethodRow], bars_per_row: int) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, 0.9 + (0.22 + 0.16 * bars_per_row) * len(rows)), layout="constrained")
    axes = figure.subplots()
    names = [row.name.replace(" (", "\n(").replace(" round", "\nround") for row in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0.0, 1.12)
    axes.set_xticks([0.0, 0.5, 1.0])
    axes.tick_params(axis="x", labelsize=8)
    tidy(axes, grid="x")
    return figure, axes


# -- the course of a round --------------------------------------------------------------------------------

Curve = tuple[str, str, str, list[float | None]]
"""Label, colour, marker, one value per step."""


@dataclass(frozen=True)
class _Panel:
    name: str
    title: str
    unit: str
    help: str
    curves: list[Curve]


def _panels(steps: Sequence[StepRecord]) -> list[_Panel]:
    """Every panel for which the solver has any value."""
    applied = [step.update_norm if step.accepted else None for step in steps]
    predicted: Curve = ("predicted", ORANGE, "s", [step.predicted_reduction for step in steps])
    actual: Curve = ("actual", BLUE, "o", [step.actual_reduction for step in steps])
    everything = [
        _Panel(
            "objective",
            "Objective",
            "nats per token",
            "The loss on each step's own minibatch: it falls, with noise from step to step.",
            [("loss", BLUE, "o", [step.loss for step in steps])],
        ),
        _Panel(
            "forget_distance",
            "Distance of forget from holdout",
            "nats per token",
            "At zero the forgotten records are as hard for the model as records that it never saw.",
            [("forget distance", VERMILION, "o", [forget_distance(step.terms) for step in steps])],
        ),
        _Panel(
            "step_length",
            "Length of the step",
            "parameter units",
            "alpha is the length that the cubic model asks for; an accepted step has just that length.",
            [("alpha", ORANGE, "s", [step.alpha for step in steps]), ("applied", BLUE, "o", applied)],
        ),
        _Panel(
            "gamma",
            "Implied damping gamma",
            "curvature units",
            "The damping that the cubic model chose by itself; large where the loss is steep and curved.",
            [("gamma", GREEN, "o", [step.gamma for step in steps])],
        ),
        _Panel(
            "cubic_coefficient",
            "Cubic coefficient M",
            "loss / length³",
            "It grows after a rejected step, which makes the next one shorter, and falls after good ones.",
            [("M", GREEN, "o", [step.cubic_coefficient for step in steps])],
        ),
        _Panel(
            "reduction",
            "Reduction of the objective",
            "nats per token",
            "Where the two agree the cubic model described the loss well; far apart, the step was too long for it.",
            [predicted, actual],
        ),
    ]
    shown = []
    for panel in everything:
        present = [curve for curve in panel.curves if any(value is not None for value in curve[3])]
        if present:
            shown.append(_Panel(panel.name, panel.title, panel.unit, panel.help, present))
    return shown


def steps_pictures(steps: Sequence[StepRecord]) -> list[Picture]:
    """Loss, forget distance, step length, gamma, M, predicted and actual reduction over the steps.

    Steps that were rejected for good carry a cross. Panels without any value (a first-order solver has no alpha) and
    values that are not finite are left out.
    """
    num_rejected = sum(not step.accepted for step in steps)
    crosses = f" A cross is a step rejected for good ({num_rejected} of {len(steps)})." if num_rejected else ""
    return [
        Picture(
            panel.name,
            panel.title,
            panel.help + crosses,
            f"{panel.title}, {panel.unit}, over {len(steps)} steps. {' '.join(map(_in_words, panel.curves))}",
            svg_text(_draw_panel(steps, panel)),
        )
        for panel in _panels(steps)
    ]


def draw_steps(steps: Sequence[StepRecord]) -> list[Figure]:
    """The figures of `steps_pictures`."""
    return [_draw_panel(steps, panel) for panel in _panels(steps)]


def _in_words(curve: Curve) -> str:
    values = [value for value in curve[3] if value is not None and math.isfinite(value)]
    if not values:
        return f"{curve[0]}: no finite value."
    first, last, low, high = (number(v, 3) for v in (values[0], values[-1], min(values), max(values)))
    return f"{curve[0]}: from {first} to {last}, between {low} and {high}."


def _draw_panel(steps: Sequence[StepRecord], panel: _Panel) -> Figure:
    figure, axes = canvas()
    for curve in panel.curves:
        _plot(axes, steps, curve)
    _scale(axes, [value for curve in panel.curves for value in curve[3]])
    axes.set_ylabel(panel.unit, fontsize=9)
    axes.set_xlabel("step", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(panel.curves) > 1:
        axes.legend(frameon=False, fontsize=8)
    tidy(axes)
    return figure


def _plot(axes: Axes, steps: Sequence[StepRecord], curve: Curve) -> None:
    """One line over accepted and rejected steps alike; rejected ones get a cross instead of the marker."""
    label, colour, marker, values = curve
    kept = [(s, value) for s, value in zip(steps, values, strict=True) if value is not None and math.isfinite(value)]
    axes.plot([s.step + 1 for s, _ in kept], [value for _, value in kept], color=colour, linewidth=1.3, label=label)
    for accepted, style in ((True, marker), (False, "x")):
        points = [(step.step + 1, value) for step, value in kept if step.accepted is accepted]
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
