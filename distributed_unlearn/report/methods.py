"""Figures of several methods: performance by round, alpha and gamma by step, update norms, time and products.

As in Bui et al. (arXiv 2406.14507): Figures 2 and 5 (performance by round) and 3 (alpha and gamma).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from distributed_unlearn.records import SetScores, StepRecord
from distributed_unlearn.report.comparison import Spread, spread
from distributed_unlearn.report.drawing import (
    BLUE,
    GREY,
    Cell,
    Picture,
    canvas,
    finite,
    legend_below,
    style,
    svg_text,
    tidy,
)
from distributed_unlearn.report.tables import SETS, number


@dataclass(frozen=True)
class CourseRound:
    """One round of one run, as figures need it."""

    scores: dict[str, SetScores]
    tug_of_war: float | None
    update_norm: float
    wall_seconds: float
    num_products: int
    steps: tuple[StepRecord, ...]
    """Empty where the run's own record is not at hand."""


@dataclass(frozen=True)
class Course:
    """One run of one method: its rounds in order."""

    label: str
    """Runs of the same label are seeds of one method."""
    seed: int
    before: dict[str, SetScores]
    before_tug_of_war: float | None
    rounds: tuple[CourseRound, ...]


@dataclass(frozen=True)
class Levels:
    """What methods are compared with, by round: scores of the retrained models, and how far two of them are apart."""

    reference: tuple[dict[str, SetScores], ...] = ()
    noise_tug_of_war: tuple[float | None, ...] = ()


def by_label(courses: Sequence[Course]) -> dict[str, list[Course]]:
    """The runs of every method, in the order in which the methods come."""
    found: dict[str, list[Course]] = {}
    for course in courses:
        found.setdefault(course.label, []).append(course)
    return found


Points = list[tuple[int, Spread]]
"""Rounds (0: before the first) and what was measured after them."""


def _points(courses: Sequence[Course], before: Callable[[Course], float | None], after: "OfRound") -> Points:
    longest = max(len(course.rounds) for course in courses)
    found = [(0, spread([before(course) for course in courses]))]
    for index in range(longest):
        values = [after(course.rounds[index]) for course in courses if index < len(course.rounds)]
        found.append((index + 1, spread(values)))
    return [(index, value) for index, value in found if value is not None]


OfRound = Callable[[CourseRound], float | None]


# -- performance by round (Figures 2 and 5) ---------------------------------------------------------------


def performance_pictures(courses: Sequence[Course], levels: Levels) -> list[Picture]:
    """Tug-of-War by round, and the share memorised of each set by round; only what was measured."""
    methods = by_label(courses)
    found = []
    closeness = {
        label: _points(runs, lambda run: run.before_tug_of_war, lambda item: item.tug_of_war)
        for label, runs in methods.items()
    }
    if any(closeness.values()):
        noise = [(index + 1, value) for index, value in enumerate(levels.noise_tug_of_war) if value is not None]
        dashed = " The dashed line is how near two retrained models are to each other." if noise else ""
        found.append(
            _by_round(
                "performance_tug_of_war",
                "Closeness to the retrained model by round",
                "Tug-of-War",
                "1 is indistinguishable from a model trained without the forgotten records; a line that falls means "
                f"that round after round of forgetting wears the model out.{dashed}",
                closeness,
                noise,
            )
        )
    for name in SETS:
        points = {label: _points(runs, _before(name), _after(name)) for label, runs in methods.items()}
        if any(points.values()):
            reference = [
                (index + 1, scores[name].exact_memorisation)
                for index, scores in enumerate(levels.reference)
                if name in scores
            ]
            found.append(
                _by_round(
                    f"performance_{name}",
                    f"What is still known of the {name} set, by round",
                    "share predicted",
                    _SET_HELP[name] + (" The dashed line is the retrained model." if reference else ""),
                    points,
                    reference,
                )
            )
    return found


_SET_HELP = {
    "forget": "Each round has a forget set of its own. It should end where the retrained model is, not at zero.",
    "retain": "What should be kept: the nearer to where it started, the better.",
    "holdout": "Records that no model has seen: a fall means that the model lost more than what it was to forget.",
}


def _before(name: str) -> Callable[[Course], float | None]:
    return lambda run: run.before[name].exact_memorisation if name in run.before else None


def _after(name: str) -> OfRound:
    return lambda item: item.scores[name].exact_memorisation if name in item.scores else None


def _by_round(
    name: str, title: str, unit: str, help: str, methods: Mapping[str, Points], dashed: Sequence[tuple[int, float]]
) -> Picture:
    figure, axes = canvas()
    rows: list[tuple[Cell, ...]] = []
    sentences = []
    for index, (label, points) in enumerate(methods.items()):
        if not points:
            continue
        colour, line, marker = style(index)
        at, means = [x for x, _ in points], [value.mean for _, value in points]
        axes.plot(at, means, line, color=colour, marker=marker, markersize=3.5, linewidth=1.3, label=label)
        if any(value.deviation is not None for _, value in points):
            low, high = [value.low for _, value in points], [value.high for _, value in points]
            axes.fill_between(at, low, high, color=colour, alpha=0.12, linewidth=0)
        rows += [(label, x, value.mean, value.deviation, value.low, value.high) for x, value in points]
        sentences.append(f"{label}: from {number(means[0], 3)} to {number(means[-1], 3)}.")
    if dashed:
        axes.plot(
            [x for x, _ in dashed],
            [y for _, y in dashed],
            "--",
            color="black",
            marker="_",
            linewidth=1.2,
            label="retrained",
        )
        rows += [("retrained", x, y, None, None, None) for x, y in dashed]
        sentences.append(f"Retrained: {number(dashed[-1][1], 3)} at the end.")
    axes.set_ylim(-0.03, 1.05)
    axes.set_xlabel("round (0: before the first)", fontsize=9)
    axes.set_ylabel(unit, fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    tidy(axes)
    legend_below(figure, axes)
    header = ("method", "round", "mean", "standard_deviation", "least", "greatest")
    return Picture(name, title, help, f"{title}. {' '.join(sentences)}", svg_text(figure), header, tuple(rows))


# -- alpha and gamma by step and round (Figure 3) ---------------------------------------------------------


def damping_pictures(courses: Sequence[Course]) -> list[Picture]:
    """Alpha and gamma over all steps of all rounds, for every method that has them; each method's first seed."""
    first = [runs[0] for runs in by_label(courses).values()]
    quantities = (
        (
            "alpha",
            "Length of the step alpha",
            "parameter units",
            "alpha is the length of a step, found together with the step itself. It shrinks to a plateau when what is "
            "left to do gets little; grey lines are the beginnings of rounds.",
        ),
        (
            "gamma",
            "Damping gamma",
            "curvature units",
            "gamma = M alpha / 2 is the damping that this amounts to, which other methods must be told in advance; "
            "grey lines are the beginnings of rounds.",
        ),
    )
    found = []
    for name, title, unit, help in quantities:
        curves = {run.label: _over_steps(run, name) for run in first}
        known = {label: points for label, points in curves.items() if points}
        if known:
            found.append(_over_rounds(name, title, unit, help, known))
    return found


StepPoint = tuple[int, int, int, float]
"""Position over all rounds from 1, round from 1, step from 1, value."""


def _over_steps(run: Course, quantity: str) -> list[StepPoint]:
    found, position = [], 0
    for index, item in enumerate(run.rounds):
        for step in item.steps:
            position += 1
            value: float | None = getattr(step, quantity)
            if value is not None and math.isfinite(value):
                found.append((position, index + 1, step.step + 1, value))
    return found


def _over_rounds(name: str, title: str, unit: str, help: str, curves: Mapping[str, list[StepPoint]]) -> Picture:
    figure, axes = canvas()
    rows: list[tuple[Cell, ...]] = []
    sentences = []
    for index, (label, points) in enumerate(curves.items()):
        colour, line, marker = style(index)
        values = [value for *_, value in points]
        at = [position for position, *_ in points]
        axes.plot(at, values, line, color=colour, marker=marker, markersize=3, linewidth=1.2, label=label)
        starts = [position for position, round_index, step, _ in points if round_index > 1 and step == 1]
        if index == 0:
            for start in starts:
                axes.axvline(start - 0.5, color="#bbbbbb", linewidth=0.8, zorder=0.5)
        rows += [(label, round_index, step, value) for _, round_index, step, value in points]
        sentences.append(f"{label}: from {number(values[0], 3)} to {number(values[-1], 3)} over {len(values)} steps.")
    if min(value for points in curves.values() for *_, value in points) > 0.0:
        axes.set_yscale("log")
    axes.set_xlabel("step, over all rounds", fontsize=9)
    axes.set_ylabel(unit, fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    tidy(axes)
    legend_below(figure, axes)
    return Picture(
        name,
        title,
        help,
        f"{title}. {' '.join(sentences)}",
        svg_text(figure),
        ("method", "round", "step", name),
        tuple(rows),
    )


# -- update norms, time and products ----------------------------------------------------------------------


def cost_pictures(courses: Sequence[Course]) -> list[Picture]:
    """Update norm of the last round, seconds and products over all rounds, by method; means over seeds."""
    methods = by_label(courses)
    everything = (
        (
            "update_norm",
            "How far the weights moved",
            "norm of the last round's update",
            "A bar that is orders of magnitude longer than the others belongs to a step that left the model behind: "
            "the scale is logarithmic.",
            lambda run: run.rounds[-1].update_norm,
            True,
        ),
        (
            "seconds",
            "Time",
            "seconds of steps, all rounds",
            "Wall time of the rounds; scores before and after are not counted.",
            lambda run: sum(item.wall_seconds for item in run.rounds),
            True,
        ),
        (
            "products",
            "Curvature products",
            "products, all rounds",
            "A product of curvature with a vector costs one to three gradients; first-order methods need none.",
            lambda run: float(sum(item.num_products for item in run.rounds)),
            False,
        ),
    )
    found = []
    for name, title, unit, help, of, logarithmic in everything:
        values = {label: spread([of(run) for run in runs]) for label, runs in methods.items()}
        known = {label: value for label, value in values.items() if value is not None}
        if known:
            found.append(_bars(name, title, unit, help, known, logarithmic))
    return found


def _bars(name: str, title: str, unit: str, help: str, values: Mapping[str, Spread], logarithmic: bool) -> Picture:
    figure, axes = canvas(0.9 + 0.3 * len(values))
    labels, means = list(values), [value.mean for value in values.values()]
    bars = axes.barh(range(len(labels)), means, 0.6, color=BLUE)
    axes.bar_label(bars, [number(mean, 3) for mean in means], fontsize=8, padding=2)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set_xlabel(unit, fontsize=9)
    _room(axes, means, logarithmic)
    tidy(axes, grid="x")
    rows = tuple((label, v.mean, v.deviation, v.low, v.high) for label, v in values.items())
    sentences = "; ".join(f"{label} {number(mean, 3)}" for label, mean in zip(labels, means, strict=True))
    header = ("method", "mean", "standard_deviation", "least", "greatest")
    return Picture(name, title, help, f"{title}, {unit}. {sentences}.", svg_text(figure), header, rows)


def _room(axes: Axes, means: Sequence[float], logarithmic: bool) -> None:
    """A logarithmic scale where values differ by more than a decade, and room for the numbers beside the bars."""
    positive = [value for value in finite(means) if value > 0.0]
    if logarithmic and positive and max(positive) > 10.0 * min(positive):
        axes.set_xscale("log")
        axes.set_xlim(min(positive) / 3.0, max(positive) * (max(positive) / min(positive)) ** 0.35 * 3.0)
    else:
        axes.set_xlim(0.0, 1.3 * max(positive, default=1.0))
        axes.xaxis.set_major_locator(MaxNLocator(4))
    if not positive:
        axes.axvline(0.0, color=GREY, linewidth=0.8)
