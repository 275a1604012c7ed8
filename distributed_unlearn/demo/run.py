"""The demo: train on fictitious people, retrain without three of them, unlearn the three, compare.

It writes its records and an untrained model, then runs jobs over them as any user's are run.
"""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console

from distributed_unlearn.cluster.open import open_group
from distributed_unlearn.commands.run import run_job
from distributed_unlearn.config import ClusterConfig, JobConfig, SteppingConfig
from distributed_unlearn.demo.jobs import DemoJobs
from distributed_unlearn.demo.people import generate_people, write_people
from distributed_unlearn.demo.settings import Baseline, DemoSettings, baselines
from distributed_unlearn.demo.tokenizer import train_tokenizer
from distributed_unlearn.errors import ConfigError
from distributed_unlearn.evaluation.metrics import tug_of_war
from distributed_unlearn.files import complete_folder, set_aside, write_json
from distributed_unlearn.provenance import package_versions
from distributed_unlearn.records import RoundRecord, RunRecord, SetScores, StepRecord, to_json
from distributed_unlearn.report.figures import comparison_pictures, steps_pictures
from distributed_unlearn.report.page import Summary, write_page
from distributed_unlearn.report.progress import RoundProgress, TrainingProgress
from distributed_unlearn.report.tables import SETS, MethodRow, comparison_table
from distributed_unlearn.rounds.events import OnStep, OnTrainingStep, Unwatched
from distributed_unlearn.rounds.folder import claimed, confirm_shared, output_folder
from distributed_unlearn.rounds.report import PICTURES, summarise_run, write_pictures
from distributed_unlearn.workers.client import Workers
from distributed_unlearn.workers.group import WorkerGroup
from distributed_unlearn.workers.messages import ArchitectureSettings

_PAPERS = ("report.html", "summary.json")
"""What tells of the demo's checkpoints, the summary last; see `set_aside`."""
_WRITTEN = (
    *_PAPERS,
    *("records.jsonl", "initial", "original", "retrained", "unlearned"),
    *(baseline.folder for baseline in baselines()),
    PICTURES,
)


@dataclass(frozen=True)
class _Compared:
    """The rows of the comparison, and the record of the cubic run."""

    rows: list[MethodRow]
    cubic: RunRecord

    @property
    def round(self) -> RoundRecord:
        """The cubic run's only round."""
        return self.cubic.rounds[0]


def run_demo(settings: DemoSettings, cluster: ClusterConfig, folder: Path, overwrite: bool, console: Console) -> None:
    """Run the demo and write its runs, summary.json, pictures and report.html into `folder`.

    Raises:
        ConfigError: the folder holds something that the demo would replace and `overwrite` is false.
    """
    folder = output_folder(str(folder))
    with claimed(folder):
        taken = [name for name in _WRITTEN if (folder / name).exists()]
        if taken and not overwrite:
            raise ConfigError(
                f"'{folder}' with an earlier demo or other files ({', '.join(taken)})",
                "a folder without them",
                "give --overwrite or another --output",
            )
        started, versions = time.monotonic(), package_versions()
        with open_group(cluster) as group:
            workers = Workers(group)
            confirm_shared(workers, folder)
            set_aside([folder / name for name in _PAPERS])  # they tell of checkpoints that go one by one from here on
            create_initial(settings, workers, folder)
            compared = _compare(DemoJobs(settings, cluster, folder), console, group)
        _write(settings, cluster, folder, compared, versions, time.monotonic() - started)
    console.print(comparison_table(compared.rows, console.width))
    for sentence in () if compared.cubic.verdict is None else compared.cubic.verdict.sentences:
        console.print(sentence, markup=False, highlight=False)
    console.print(f"The cubic steps ended because {compared.round.stop_reason}.", markup=False, highlight=False)
    console.print(f"written: {folder / 'summary.json'}, {folder / 'report.html'}", markup=False, highlight=False)


def tokenizer_texts(settings: DemoSettings) -> list[str]:
    """What the demo's tokenizer learns its merges from: other made-up people, none of the demo's own.

    A pretrained tokenizer has met nobody whose records a model is fine-tuned on. One that had would hold their names as
    whole tokens, which no update of weights removes; and one that had met all but those to be forgotten and held out
    would spell the names of these alone in letters that training hardly sees.
    """
    others = generate_people(settings.num_subjects, settings.records_per_subject, settings.seed + 1_000_003)
    return [f"{person['question']} {person['answer']}" for person in others]


def create_initial(settings: DemoSettings, workers: Workers, folder: Path) -> None:
    """Write the records and an untrained model with its tokenizer, where everything that follows looks for them."""
    write_people(folder / "records.jsonl", settings.num_subjects, settings.records_per_subject, settings.seed)
    tokenizer = train_tokenizer(tokenizer_texts(settings), settings.vocab_size, settings.context_length)
    special = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    with complete_folder(folder / "initial", overwrite=True) as staging:
        architecture: ArchitectureSettings = {**settings.architecture, **special}
        workers.create_checkpoint("llama", architecture, str(staging.resolve()), settings.seed, "causal_lm")
        tokenizer.save_pretrained(staging)


class _DemoEvents(Unwatched):
    """Bars and lines named after the method; notes when the stopping rule's conditions first held."""

    def __init__(self, console: Console, name: str, job: JobConfig) -> None:
        assert isinstance(job.solver, SteppingConfig)
        self._console, self._name, self._stop = console, name, job.solver.stop
        self.matched_after: float | None = None
        """Seconds of steps until then."""

    @contextmanager
    def round(self, round_index: int, num_rounds: int, max_steps: int) -> Iterator[OnStep]:
        """A bar, without an end where only the clock ends the run."""
        seconds = 0.0

        def on_step(record: StepRecord, measured: Mapping[str, float]) -> None:
            nonlocal seconds
            seconds += record.wall_seconds
            excess = measured.get("retain_probe_excess")
            if self.matched_after is None and excess is not None and excess <= self._stop.retain_tolerance_nats:
                self.matched_after = seconds
            progress.update(record, measured)

        total = max_steps if self._stop.max_seconds is None else None
        with RoundProgress(self._console, total, self._name) as progress:
            yield on_step

    @contextmanager
    def training(self, num_steps: int) -> Iterator[OnTrainingStep]:
        """A bar over the training's steps."""
        with TrainingProgress(self._console, num_steps, f"training the {self._name} model") as progress:
            yield progress.update


def _compare(jobs: DemoJobs, console: Console, group: WorkerGroup) -> _Compared:
    original = _train(jobs.training("original", exclude_forget=False), "original", console, group)
    retrained = _train(jobs.training("retrained", exclude_forget=True), "retrained", console, group)
    reference = retrained.scores
    job = jobs.unlearning("unlearned")
    cubic = run_job(job, _DemoEvents(console, "cubic steps", job), group).record
    rows = [
        replace(original, tug_of_war=tug_of_war(original.scores, reference), num_products=0),
        _row("unlearned (SCureNewton)", cubic.rounds[0]),
    ]
    for baseline in baselines():
        job = jobs.baseline(baseline, cubic.rounds[0].wall_seconds)
        rows.append(_run_baseline(job, baseline, console, group, rows[1]))
    rows.append(replace(retrained, name="retrained (the reference)", tug_of_war=1.0, num_products=0))
    return _Compared(rows, cubic)


def _row(name: str, record: RoundRecord) -> MethodRow:
    return MethodRow(name, record.after, record.tug_of_war, record.wall_seconds, record.num_products)


def _train(job: JobConfig, name: str, console: Console, group: WorkerGroup) -> MethodRow:
    training = run_job(job, _DemoEvents(console, name, job), group).record.training
    assert training is not None and training.scores is not None
    console.print(f"trained the {name} model in {training.wall_seconds:.1f} s", markup=False, highlight=False)
    scores: dict[str, SetScores] = {key: training.scores[key] for key in SETS}
    return MethodRow(name, scores, None, training.wall_seconds, None)


def _run_baseline(
    job: JobConfig, baseline: Baseline, console: Console, group: WorkerGroup, cubic: MethodRow
) -> MethodRow:
    """A first-order method from the original weights for at least the wall time of the cubic steps."""
    events = _DemoEvents(console, baseline.name, job)
    row = _row(baseline.name, run_job(job, events, group).record.rounds[0])
    if not baseline.is_cubic_objective:
        return row
    assert row.tug_of_war is not None and cubic.tug_of_war is not None and cubic.wall_seconds is not None
    notes = [f"learning rate {baseline.learning_rate:g}"]
    if row.tug_of_war > cubic.tug_of_war:
        notes.append(f"better than the cubic steps by {row.tug_of_war - cubic.tug_of_war:.3f} at equal time")
    if events.matched_after is not None and events.matched_after < cubic.wall_seconds:
        notes.append(f"faster: met the stopping rule after {events.matched_after:.1f} s")
    return replace(row, note="; ".join(notes))


def _write(
    settings: DemoSettings,
    cluster: ClusterConfig,
    folder: Path,
    compared: _Compared,
    versions: dict[str, str | None],
    seconds: float,
) -> None:
    """Pictures, page and, last, the summary that tells of everything."""
    rows, comparison, course = compared.rows, comparison_pictures(compared.rows), steps_pictures(compared.round.steps)
    write_pictures(folder, [("", picture) for picture in (*comparison, *course)])
    summary_page = _summary(settings, compared)
    write_page(folder / "report.html", summary_page, rows, comparison, [(compared.round, course)])
    tree = asdict(settings)
    for name in ("train", "solver", "curvature"):
        tree[name] = json.loads(getattr(settings, name).model_dump_json())
    summary = {
        "format": 2,
        "settings": tree,
        "cluster": cluster.model_dump(mode="json"),
        "versions": versions,
        "methods": rows,
        "round": compared.round,
        "wall_seconds": seconds,
    }
    write_json(folder / "summary.json", to_json(summary))


def _summary(settings: DemoSettings, compared: _Compared) -> Summary:
    run = summarise_run(compared.cubic, "of the demo")
    asked = f"{settings.num_forget_subjects} fictitious people ask to be forgotten. {run.asked}"
    notes = [(row.name, row.note) for row in compared.rows if row.note]
    return replace(run, title="Unlearning demo", asked=asked, facts=(*run.facts, *notes))
