"""An evaluation for people: every number beside what it says, and pictures with the numbers they are drawn from."""

from collections.abc import Mapping
from itertools import groupby

from distributed_unlearn.records.evaluation import EvaluationRecord, MetricRow
from distributed_unlearn.report.drawing import BLUE, GREY, Picture, canvas, svg_text, tidy
from distributed_unlearn.report.figures import SET_COLOURS
from distributed_unlearn.report.tables import number

_BETTER = {
    "higher": "Higher is better.",
    "lower": "Lower is better.",
    "zero": "0 is best.",
    "reference": "Best is the retrained model's value.",
}


def evaluation_lines(record: EvaluationRecord) -> list[str]:
    """The terminal's table: each metric with what it says, below it its value on every set; then what was not measured.

    Columns: the set, the value, its 95 % interval, the retrained model's value, the noise between two retrained models.
    """
    lines = [_columns("", "value", "95 % interval", "retrained", "noise")]
    for _, rows in groupby(record.rows, key=lambda row: (row.sentence, row.condition)):
        group = list(rows)
        first = group[0]
        title = f"{first.title.partition(', ')[0]} {first.condition}".strip()
        unit = f" ({first.unit})" if first.unit else ""
        lines += ["", f"{title[0].upper()}{title[1:]}{unit}: {first.sentence} {_BETTER[first.better]}"]
        lines += [_value_line(row) for row in group]
    lines.append("")
    lines += [f"not measured: {item.name}, which {item.why}" for item in record.not_measured]
    return lines


def _value_line(row: MetricRow) -> str:
    attack = row.title.partition(", ")[2]
    label = row.set_name.replace("_", " ") + (f", {attack}" if attack else "")
    interval = "–" if row.low is None or row.high is None else f"{number(row.low, 3)} to {number(row.high, 3)}"
    text = _columns(label, number(row.value, 3), interval, number(row.retrained, 3), number(row.noise_floor, 3))
    return f"{text}   {row.note}".rstrip()


def _columns(label: str, value: str, interval: str, retrained: str, noise: str) -> str:
    return f"  {label:<26}{value:>10}{interval:>24}{retrained:>11}{noise:>10}".rstrip()


def evaluation_pictures(record: EvaluationRecord) -> list[Picture]:
    """Each with the numbers that it is drawn from."""
    found = [_loss_picture(name, record.loss_quantiles) for name in record.loss_quantiles["model"]]
    if record.depth_by_block:
        found.append(_depth_picture(record.depth_by_block))
    return found


def _loss_picture(set_name: str, quantiles: Mapping[str, Mapping[str, tuple[float, ...]]]) -> Picture:
    """How the records' losses are spread, under the model and the retrained ones (Figure 4 of the paper)."""
    figure, axes = canvas()
    styles = {"model": (BLUE, "-"), "retrained": (GREY, "--"), "retrained_again": (GREY, ":")}
    for role, sets in quantiles.items():
        values = sets[set_name]
        levels = [index / (len(values) - 1) for index in range(len(values))]
        colour, style = styles[role]
        axes.plot(values, levels, color=colour, linestyle=style, label=role.replace("_", " "))
    axes.set_xlabel("mean loss of a record, nats per token")
    axes.set_ylabel("share of records below")
    axes.set_ylim(0, 1)
    tidy(axes)
    axes.legend(frameon=False, fontsize="small")
    middles = {role: number(sets[set_name][len(sets[set_name]) // 2], 3) for role, sets in quantiles.items()}
    words = ", ".join(f"{role.replace('_', ' ')} {value}" for role, value in middles.items())
    roles, count = list(quantiles), len(quantiles["model"][set_name])
    return Picture(
        name=f"losses_{set_name}",
        title=f"Losses of the {set_name} set",
        help="A curve further to the right: the model finds the records harder. Equal curves: both models treat the "
        "records alike.",
        alternative=f"Distribution of the {set_name} records' mean losses; medians in nats per token: {words}.",
        svg=svg_text(figure),
        header=("share_of_records", *(f"{role}_loss_nats_per_token" for role in roles)),
        rows=tuple(
            (index / (count - 1), *(quantiles[role][set_name][index] for role in roles)) for index in range(count)
        ),
    )


def _depth_picture(by_block: Mapping[str, tuple[float, ...]]) -> Picture:
    """What a linear probe reads from each block."""
    figure, axes = canvas()
    for name, values in by_block.items():
        axes.plot(range(1, len(values) + 1), values, marker="o", color=SET_COLOURS[name], label=name)
    axes.set_xlabel("block")
    axes.set_ylabel("answer tokens read")
    axes.set_ylim(0, 1)
    tidy(axes)
    axes.legend(frameon=False, fontsize="small")
    best = ", ".join(f"{name} {number(max(values), 3)}" for name, values in by_block.items())
    names, count = list(by_block), len(next(iter(by_block.values())))
    return Picture(
        name="depth",
        title="What a simple decoder reads from inside the model",
        help="Forgotten is where the forget set's curve lies on the holdout set's; near the retain set's, the answers "
        "are still inside.",
        alternative=f"Share of answer tokens that a linear probe reads by block; largest: {best}.",
        svg=svg_text(figure),
        header=("block", *names),
        rows=tuple((index + 1, *(by_block[name][index] for name in names)) for index in range(count)),
    )
