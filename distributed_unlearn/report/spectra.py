"""Figure 1 of Bui et al. (arXiv 2406.14507): eigenspectrum of the retain Hessian and its numerical rank over epochs."""

from collections.abc import Sequence

from distributed_unlearn.records.spectrum import SpectrumPoint, SpectrumRecord
from distributed_unlearn.report.drawing import Cell, Picture, canvas, legend_below, style, svg_text, tidy
from distributed_unlearn.report.tables import number


def spectrum_pictures(spectra: Sequence[tuple[str, SpectrumRecord]]) -> list[Picture]:
    """For each measurement its eigenvalues by rank, and the numerical rank over the epochs where there are several."""
    found = []
    for index, (name, record) in enumerate(spectra):
        prefix = "spectrum" if len(spectra) == 1 else f"spectrum_{index + 1}"
        found.append(_eigenvalues(prefix, name, record))
        if len([point for point in record.points if point.epoch is not None]) > 1:
            found.append(_ranks(f"{prefix}_rank", name, record))
    return found


def _named(point: SpectrumPoint) -> str:
    return "the model" if point.epoch is None else f"epoch {point.epoch}"


def _eigenvalues(prefix: str, name: str, record: SpectrumRecord) -> Picture:
    """Sizes of the eigenvalues, the largest first, against the number of eigenvalues that are as large."""
    figure, axes = canvas()
    rows: list[tuple[Cell, ...]] = []
    sentences = []
    largest = max(max(map(abs, point.eigenvalues)) for point in record.points)
    for index, point in enumerate(record.points):
        by_size = sorted(zip(point.eigenvalues, point.shares, strict=True), key=lambda pair: -abs(pair[0]))
        count, at, sizes = 0.0, [], []
        for value, share in by_size:
            count += share * record.dimension
            at.append(count)
            sizes.append(abs(value))
        colour, line, _ = style(index)
        axes.step(at, sizes, line, where="pre", color=colour, linewidth=1.3, label=_named(point))
        rows += [(_named(point), value, share) for value, share in zip(point.eigenvalues, point.shares, strict=True)]
        negative = sum(share for value, share in by_size if value < 0.0)
        sentences.append(
            f"{_named(point)}: from {number(point.eigenvalues[0], 3)} to {number(point.eigenvalues[-1], 3)}, "
            f"{negative:.0%} negative."
        )
    axes.set_xscale("symlog", linthresh=1.0)
    axes.set_xlim(0.0, record.dimension)
    axes.set_yscale("log")
    axes.set_ylim(max(1e-8 * largest, 1e-30), 2.0 * largest)
    axes.set_xlabel(f"eigenvalues at least as large, of {record.dimension:,}", fontsize=9)
    axes.set_ylabel("size of the eigenvalue", fontsize=9)
    tidy(axes)
    legend_below(figure, axes)
    how = "all computed" if record.method == "exact" else f"estimated from {record.num_probes} random starts"
    title = f"Eigenvalues of the retain Hessian ({name})"
    help = (
        "A curve that drops early says that the loss is curved in a few directions only: a Newton step divides by the "
        f"tiny eigenvalues of all others, which is why plain Newton steps fail. Eigenvalues are {how}."
    )
    words = f"{title}, largest first. {' '.join(sentences)}"
    return Picture(prefix, title, help, words, svg_text(figure), ("model", "eigenvalue", "share"), tuple(rows))


def _ranks(prefix: str, name: str, record: SpectrumRecord) -> Picture:
    """The numerical rank over the epochs, for every cutoff."""
    figure, axes = canvas()
    points = [point for point in record.points if point.epoch is not None]
    rows: list[tuple[Cell, ...]] = []
    sentences = []
    for index, first in enumerate(points[0].ranks):
        colour, line, marker = style(index)
        epochs = [point.epoch or 0 for point in points]
        ranks = [point.ranks[index] for point in points]
        values = [rank.rank for rank in ranks]
        errors = [rank.standard_error or 0.0 for rank in ranks]
        label = f"above {first.cutoff:g} of the largest"
        axes.errorbar(epochs, values, errors, fmt=line, marker=marker, color=colour, markersize=4, label=label)
        rows += [(rank.cutoff, e, rank.rank, rank.standard_error) for rank, e in zip(ranks, epochs, strict=True)]
        sentences.append(f"{label}: from {number(values[0], 3)} to {number(values[-1], 3)}.")
    axes.set_ylim(0.0, None)
    axes.set_xlabel("epoch of the training", fontsize=9)
    axes.set_ylabel(f"numerical rank, of {record.dimension:,}", fontsize=9)
    tidy(axes)
    legend_below(figure, axes)
    title = f"Numerical rank of the retain Hessian ({name})"
    help = (
        "How many eigenvalues are larger than a share of the largest one: as the model learns, fewer and fewer "
        "directions of its weights matter to the loss."
    )
    header = ("cutoff", "epoch", "rank", "standard_error")
    return Picture(prefix, title, help, f"{title}. {' '.join(sentences)}", svg_text(figure), header, tuple(rows))
