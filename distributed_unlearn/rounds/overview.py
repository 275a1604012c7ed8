"""One page about several runs, comparisons and spectra, from what their folders hold; each figure also as data."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from distributed_unlearn.errors import ConfigError, DataError
from distributed_unlearn.evaluation.metrics import tug_of_war
from distributed_unlearn.files import complete_folder, write_json, write_text
from distributed_unlearn.records import RECORD_NAME, RunRecord, SetScores, read_record, to_json
from distributed_unlearn.records.comparison import COMPARISON_NAME, Cell, Comparison, read_comparison
from distributed_unlearn.records.spectrum import SPECTRUM_NAME, SpectrumRecord, read_spectrum
from distributed_unlearn.report.comparison import HEADER, table_cells
from distributed_unlearn.report.drawing import Picture, numbers_csv
from distributed_unlearn.report.losses import loss_pictures
from distributed_unlearn.report.methods import (
    Course,
    CourseRound,
    Levels,
    by_label,
    cost_pictures,
    damping_pictures,
    performance_pictures,
)
from distributed_unlearn.report.page import Section, Summary, write_sections
from distributed_unlearn.report.spectra import spectrum_pictures
from distributed_unlearn.report.tables import SETS, number


@dataclass
class _Found:
    """What the folders hold."""

    courses: list[Course] = field(default_factory=list)
    models: dict[str, dict[str, SetScores]] = field(default_factory=dict)
    """Scores after the last round by model's name; original and retrained among them."""
    levels: Levels = field(default_factory=Levels)
    tables: list[Section] = field(default_factory=list)
    spectra: list[tuple[str, SpectrumRecord]] = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)


def write_overview(folders: Sequence[Path], destination: Path, overwrite: bool) -> Path:
    """Read the folders and write `report.html`, `pictures/*.svg` and `data/*.csv` and `*.json` into `destination`.

    A folder is that of an unlearning run (`record.json`), a comparison (`comparison.json`) or a spectrum
    (`spectrum.json`), or of several of these. A training's own record has nothing to draw.

    Returns:
        The page.

    Raises:
        ConfigError: `destination` exists and `overwrite` is false.
        DataError: a folder that holds none of these, or one that cannot be read.
    """
    found = _Found()
    for folder in folders:
        _read(folder, found)
    sections = _sections(found)
    title = "Comparison" if len(by_label(found.courses)) > 1 else "Unlearning figures"
    names = ", ".join(folder.name or str(folder) for folder in folders)
    summary = Summary(f"{title}: {names}", _asked(found), (), None, tuple(found.facts))
    with complete_folder(destination, overwrite) as staging:
        for section in sections:
            for picture in section.pictures:
                _write_picture(staging, picture)
        write_sections(staging / "report.html", summary, sections)
    return destination / "report.html"


def _asked(found: _Found) -> str:
    methods, runs = len(by_label(found.courses)), len(found.courses)
    parts = [f"{methods} method(s), {runs} run(s)"] if runs else []
    parts += [f"{len(found.spectra)} spectrum measurement(s)"] if found.spectra else []
    return f"Drawn from {' and '.join(parts)}. The words are explained at the end."


def _write_picture(folder: Path, picture: Picture) -> None:
    for name in ("pictures", "data"):
        (folder / name).mkdir(exist_ok=True)
    write_text(folder / "pictures" / f"{picture.name}.svg", picture.svg)
    write_text(folder / "data" / f"{picture.name}.csv", numbers_csv(picture))
    tree = {"title": picture.title, "header": picture.header, "rows": picture.rows}
    write_json(folder / "data" / f"{picture.name}.json", to_json(tree))


# -- what the folders hold --------------------------------------------------------------------------------


def _read(folder: Path, found: _Found) -> None:
    if not folder.is_dir():
        raise ConfigError(f"'{folder}', which is no folder", "the output folder of a run", "check the path")
    names = (RECORD_NAME, COMPARISON_NAME, SPECTRUM_NAME)
    if not any((folder / name).is_file() for name in names):
        raise DataError(
            f"'{folder}' without {', '.join(names[:-1])} or {names[-1]}",
            "the output folder of a run, of `compare` or of `check spectrum`",
            "check the path, or wait for the end of the run",
        )
    if (folder / COMPARISON_NAME).is_file():
        _add_comparison(folder, read_comparison(folder), found)
    elif (folder / RECORD_NAME).is_file():
        record = read_record(folder / RECORD_NAME)
        if record.kind == "unlearning":
            _add_run(folder, record, found)
        elif not (folder / SPECTRUM_NAME).is_file():
            raise DataError(f"'{folder}', which holds a training", "a run that unlearns", "give its folder instead")
    if (folder / SPECTRUM_NAME).is_file():
        found.spectra.append((folder.name, read_spectrum(folder)))


def _add_run(folder: Path, record: RunRecord, found: _Found) -> None:
    label, taken = folder.name, {course.label for course in found.courses}
    if label in taken:
        label = str(folder)
    rounds = tuple(
        CourseRound(i.after, i.tug_of_war, i.update_norm, i.wall_seconds, i.num_products, i.steps)
        for i in record.rounds
    )
    first, last = record.rounds[0], record.rounds[-1]
    closeness = None
    if record.retrained is not None and len(record.rounds) == 1 and last.tug_of_war is not None:
        closeness = tug_of_war(first.before, record.retrained, tuple(record.retrained))
    found.courses.append(Course(label, 0, first.before, closeness, rounds))
    found.models.setdefault("original", last.before if len(rounds) == 1 else first.before)
    found.models[label] = last.after
    if record.retrained is not None:
        found.models["retrained"] = record.retrained
        if len(rounds) == 1 and not found.levels.reference:
            found.levels = Levels((record.retrained,), ())
    solver, objective = record.config.get("solver"), record.config.get("objective")
    method = solver.get("method") if isinstance(solver, dict) else None
    name = objective.get("name") if isinstance(objective, dict) else None
    found.facts.append((label, f"{method} on {name}, model {record.base.path}, started {record.started_at}"))


def _add_comparison(folder: Path, comparison: Comparison, found: _Found) -> None:
    last = comparison.num_rounds - 1
    for label in comparison.labels:
        for cell in comparison.of(label):
            found.courses.append(_course(folder, comparison, cell))
            if label not in found.models:
                found.models.setdefault("original", cell.before)
                found.models[label] = cell.rounds[-1].scores
    reference = comparison.reference(last)
    if reference is not None:
        found.models["retrained"] = reference.scores
    firsts = [comparison.reference(index) for index in range(comparison.num_rounds)]
    noise = []
    for index in range(comparison.num_rounds):
        again = [r.tug_of_war for r in comparison.references if r.round_index == index and r.tug_of_war is not None]
        noise.append(sum(again) / len(again) if again else None)
    found.levels = Levels(tuple({} if item is None else item.scores for item in firsts), tuple(noise))
    note = (
        f"After round {comparison.num_rounds}, mean ± standard deviation over {len(comparison.seeds)} seed(s). ToW "
        "(Tug-of-War): closeness to the retrained model over the three sets, 1 is best. Seconds and products are those "
        "of all rounds together; of original and retrained the seconds of their training."
    )
    body = tuple(map(tuple, table_cells(comparison)))
    found.tables.append(Section(f"Methods ({folder.name})", note, HEADER, body, ()))
    if len(comparison.cells) < comparison.num_cells:
        found.facts.append(("Unfinished", f"{len(comparison.cells)} of {comparison.num_cells} runs have ended"))
    found.facts += [
        ("Started", f"{comparison.started_at.replace('T', ' ').removesuffix('+00:00')} UTC"),
        ("Hardware", ", ".join(f"{name} {value}" for name, value in comparison.hardware.items())),
        ("Versions", ", ".join(f"{name} {value}" for name, value in comparison.versions.items() if value)),
    ]


def _course(folder: Path, comparison: Comparison, cell: Cell) -> Course:
    """A cell with the steps of its own record, where that is still there."""
    path = folder / cell.folder / RECORD_NAME
    steps = [item.steps for item in read_record(path).rounds] if path.is_file() else [()] * len(cell.rounds)
    rounds = tuple(
        CourseRound(i.scores, i.tug_of_war, i.update_norm, i.wall_seconds, i.num_products, of)
        for i, of in zip(cell.rounds, steps, strict=True)
    )
    return Course(cell.label, cell.seed, cell.before, comparison.original_tug_of_war, rounds)


# -- the page ---------------------------------------------------------------------------------------------


def _sections(found: _Found) -> list[Section]:
    sections = list(found.tables)
    if not sections and found.courses:
        sections.append(_runs_table(found.courses))
    parts = (
        (
            "Performance by round",
            "How close each method is to a retrained model, and what it still predicts of each set. Round 0 is the "
            "model before anything was forgotten. A band spans the least and the greatest of the seeds.",
            performance_pictures(found.courses, found.levels) if found.courses else [],
        ),
        (
            "Step length and damping",
            "What the cubic methods find by themselves at every step.",
            damping_pictures(found.courses),
        ),
        (
            "Losses of single records",
            "How the losses are spread: before, after the last round, and in the retrained model.",
            loss_pictures(found.models),
        ),
        ("What it costs", "Means over seeds.", cost_pictures(found.courses) if found.courses else []),
        (
            "Curvature",
            "The eigenvalues of the Hessian of the retain loss: how many directions of the weights it sees at all.",
            spectrum_pictures(found.spectra),
        ),
    )
    sections += [Section(title, note, (), (), tuple(pictures)) for title, note, pictures in parts if pictures]
    return sections


def _runs_table(courses: Sequence[Course]) -> Section:
    """Runs that no comparison belongs to, side by side after their last rounds."""
    header = ("run", "rounds", "ToW", *(f"{name} memorised" for name in SETS), "update norm", "products", "seconds")
    body = []
    for course in courses:
        last = course.rounds[-1]
        shares = [number(last.scores[name].exact_memorisation, 3) if name in last.scores else "–" for name in SETS]
        products, seconds = (sum(getattr(r, name) for r in course.rounds) for name in ("num_products", "wall_seconds"))
        cells = (course.label, str(len(course.rounds)), number(last.tug_of_war, 3), *shares)
        body.append((*cells, number(last.update_norm, 3), number(products), f"{seconds:.1f}"))
    note = "After the last round. ToW (Tug-of-War): closeness to the retrained model over the three sets, 1 is best."
    return Section("Runs", note, header, tuple(body), ())
