"""What a race leaves: means over seeds, a table, a picture."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from contestants import Course

FLOOR = "retrained, other seed"
Summary = dict[str, dict[str, float | None]]


def _mean(values: Sequence[float | None]) -> float | None:
    """Over the seeds; None where one of them never got there."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def summary(courses: Sequence[Course]) -> Summary:
    """Every contestant's last point and its times, means over the seeds."""
    found = {}
    for name in dict.fromkeys(course.contestant for course in courses):
        mine = [course for course in courses if course.contestant == name]
        last, timed = [course.points[-1] for course in mine], [] if name == FLOOR else mine
        found[name] = {
            "tug_of_war": _mean([point.tug_of_war for point in last]),
            "js_forget": _mean([point.js["forget"] for point in last]),
            "js_retain": _mean([point.js["retain"] for point in last]),
            "js_holdout": _mean([point.js["holdout"] for point in last]),
            "seconds_to_0_95": _mean([course.first(0.95, "wall_seconds") for course in timed]),
            "seconds_to_0_98": _mean([course.first(0.98, "wall_seconds") for course in timed]),
            "units_to_0_95": _mean([course.first(0.95, "units") for course in timed]),
            "units_to_0_98": _mean([course.first(0.98, "units") for course in timed]),
        }
    return found


COLUMNS = ("tug_of_war", "js_forget", "js_retain", "js_holdout", "units_to_0_95", "units_to_0_98")


def table(found: Mapping[str, Summary]) -> str:
    """Markdown: a line for each problem and contestant."""
    lines = ["| problem | contestant | " + " | ".join(name.replace("_", " ") for name in COLUMNS) + " |"]
    lines.append("|---" * (len(COLUMNS) + 2) + "|")
    for problem, of_problem in found.items():
        for name, values in of_problem.items():
            cells = [_cell(values[column], 1 if column.startswith("units") else 3) for column in COLUMNS]
            if name == FLOOR:
                cells[-2:] = ["", ""]
            lines.append(f"| {problem} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(value: float | None, digits: int) -> str:
    return "never" if value is None else f"{value:.{digits}f}"


def draw(found: Mapping[str, Sequence[Course]], path: Path) -> None:
    """Tug-of-War against units, a panel a problem, one line a contestant, band over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(found), 4), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(found), sharey=True))
    for axes, (problem, courses) in zip(panels, found.items(), strict=True):
        for name in dict.fromkeys(course.contestant for course in courses if course.contestant != FLOOR):
            mine = [course for course in courses if course.contestant == name]
            count = min(len(course.points) for course in mine)
            units = np.array([[p.units for p in course.points[:count]] for course in mine]).mean(0)
            values = np.array([[p.tug_of_war for p in course.points[:count]] for course in mine])
            width, style = (2.5, "-") if name == "scurenewton" else (1.0, "--" if "adamw" in name else ":")
            [line] = axes.plot(units, values.mean(0), style, linewidth=width, label=name)
            axes.fill_between(units, values.min(0), values.max(0), alpha=0.12, color=line.get_color())
        axes.set(title=problem, xlabel="units: CPU time of a gradient of the minibatch", ylim=(0.6, 1.0))
    panels[0].set_ylabel("Tug-of-War")
    panels[-1].legend(fontsize=7, loc="lower right")
    figure.savefig(path, dpi=90)
