"""Figure 4 of Bui et al. (arXiv 2406.14507): how the losses of single records are spread, by set and model."""

from collections.abc import Mapping

from distributed_unlearn.records import SetScores
from distributed_unlearn.report.drawing import Cell, Picture, canvas, legend_below, style, svg_text, tidy
from distributed_unlearn.report.tables import SETS, number

_HELP = (
    "A point at height 0.8 says that 80 % of the records have a loss of at most what is below it. "
    "Where the line of an unlearned model lies on that of the retrained one, no loss tells the two apart."
)


def loss_pictures(models: Mapping[str, Mapping[str, SetScores]]) -> list[Picture]:
    """One picture a set: the cumulative distribution of the records' mean losses for every model.

    Args:
        models: By the model's name (original, each unlearned one, retrained) its scores by set; those without quantiles
            are left out.
    """
    found = []
    for name in SETS:
        curves = {}
        for model, scores in models.items():
            quantiles = scores[name].loss_quantiles if name in scores else None
            if quantiles:
                curves[model] = quantiles
        if curves:
            found.append(_picture(name, curves))
    return found


def _picture(name: str, curves: Mapping[str, tuple[float, ...]]) -> Picture:
    figure, axes = canvas()
    rows: list[tuple[Cell, ...]] = []
    sentences = []
    methods = 0
    for model, quantiles in curves.items():
        shares = [index / (len(quantiles) - 1) for index in range(len(quantiles))]
        if model in ("original", "retrained"):
            line, colour = ("--" if model == "retrained" else ":"), "black"
        else:
            colour, line, _ = style(methods)
            methods += 1
        axes.plot(quantiles, shares, line, color=colour, linewidth=1.4, label=model)
        rows += [(model, share, loss) for share, loss in zip(shares, quantiles, strict=True)]
        sentences.append(f"{model}: half of the records at most {number(quantiles[len(quantiles) // 2], 3)}.")
    largest = max(quantiles[-1] for quantiles in curves.values())
    typical = max(quantiles[len(quantiles) // 2] for quantiles in curves.values())
    if largest > 20.0 * max(typical, 1e-3):
        axes.set_xscale("symlog", linthresh=max(typical, 1e-3))
    axes.set_xlabel("loss of a record, nats per token", fontsize=9)
    axes.set_ylabel("share of the records", fontsize=9)
    axes.set_ylim(-0.02, 1.02)
    tidy(axes)
    legend_below(figure, axes)
    title = f"Losses of the {name} set"
    words = f"{title}, cumulative. {' '.join(sentences)}"
    return Picture(f"losses_{name}", title, _HELP, words, svg_text(figure), ("model", "share", "loss"), tuple(rows))
