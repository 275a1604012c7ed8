"""What every picture of a report is made with: colours, sizes, axes, and its text form.

A picture is narrow enough for a phone and its text stays text. With it come a caption, a sentence of reading help, a
text that says the same in words, and the numbers that it was drawn from.
"""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# Okabe and Ito (2008): distinguishable with every common form of colour blindness.
BLUE, ORANGE, GREEN, VERMILION, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#555555"
COLOURS = (BLUE, VERMILION, GREEN, ORANGE, "#56B4E9", "#CC79A7", "#000000", GREY)
STYLES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
WIDTH, HEIGHT = 4.0, 2.7  # inches; shown at most about as wide as a phone
Cell = str | int | float | None


@dataclass(frozen=True)
class Picture:
    """One picture of a report."""

    name: str
    """File name without its ending."""
    title: str
    help: str
    """How to read it, in a sentence."""
    alternative: str
    """What it shows, in words."""
    svg: str
    header: tuple[str, ...] = ()
    """Of the numbers that it was drawn from; empty where the record beside it holds them."""
    rows: tuple[tuple[Cell, ...], ...] = ()


def tidy(axes: Axes, grid: Literal["x", "y"] = "y") -> None:
    """A light grid in one direction, no frame above and to the right."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)


def canvas(height: float = HEIGHT) -> tuple[Figure, Axes]:
    """A figure of a report's width with one pair of axes."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def legend_below(figure: Figure, axes: Axes) -> None:
    """A legend under the axes, where it covers no line; names of two columns' width."""
    handles, labels = axes.get_legend_handles_labels()
    columns = 1 if max(map(len, labels), default=0) > 24 else 2
    figure.set_size_inches(WIDTH, figure.get_figheight() + 0.17 * math.ceil(len(labels) / columns))
    figure.legend(handles, labels, loc="outside lower left", ncols=columns, frameon=False, fontsize=7.5)


def style(index: int) -> tuple[str, str, str]:
    """Colour, line style and marker of the curve with this number, so that two are never alike below 32."""
    return COLOURS[index % 8], STYLES[(index // 8) % 4], MARKERS[index % 8]


def svg_text(figure: Figure) -> str:
    """The figure as text, the same for the same data."""
    return _svg(figure)


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    FigureCanvasSVG(figure)  # needs no display and leaves pyplot's global state alone
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "distributed_unlearn"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, facecolor="white")
    return buffer.getvalue()


def numbers_csv(picture: Picture) -> str:
    """The numbers that a picture was drawn from, as a CSV file's text."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(picture.header)
    writer.writerows(picture.rows)
    return buffer.getvalue()


def finite(values: Sequence[float | None]) -> list[float]:
    """The values that are numbers."""
    return [value for value in values if value is not None and math.isfinite(value)]
