"""The demo: train on fictitious people, retrain without three of them, unlearn the three, compare."""

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from distributed_unlearn.commands.job_record import finite
from distributed_unlearn.commands.output import claimed, confirm_shared, output_folder
from distributed_unlearn.commands.workers import open_group
from distributed_unlearn.config import ClusterConfig, DataConfig, ModelConfig, ObjectiveConfig, SaveConfig, SolverConfig
from distributed_unlearn.data.prepare import PreparedData, prepare_data
from distributed_unlearn.demo.people import generate_people, write_people
from distributed_unlearn.demo.settings import Baseline, DemoSettings, baselines
from distributed_unlearn.demo.tokenizer import train_tokenizer
from distributed_unlearn.errors import ConfigError
from distributed_unlearn.evaluation.metrics import tug_of_war
from distributed_unlearn.files import complete_folder, set_aside, write_json
from distributed_unlearn.provenance import package_versions
from distributed_unlearn.records import RoundRecord, SetScores, StepRecord
from distributed_unlearn.report.figures import comparison_figure, steps_figure
from distributed_unlearn.report.page import write_page
from distributed_unlearn.report.progress import RoundProgress, TrainingProgress
from distributed_unlearn.report.run_log import RunLog
from distributed_unlearn.report.tables import MethodRow, comparison_table
from distributed_unlearn.rounds.evaluate import evaluate_sets
from distributed_unlearn.rounds.round import RoundTask, run_round
from distributed_unlearn.rounds.training import TrainingTask, run_training, write_trained
from distributed_unlearn.workers.client import Workers
from distributed_unlearn.workers.messages import ArchitectureSettings, TrainingSpec

_PAPERS = ("report.html", "summary.json")
"""What tells of the demo's checkpoints, the summary last; see `set_aside`."""
_WRITTEN = (
    *_PAPERS,
    *("records.jsonl", "initial", "original", "retrained", "unlearned"),
    *("comparison.png", "steps.png", "metrics.jsonl", "tensorboard"),
)


@dataclass(frozen=True, eq=False)
class _Demo:
    """What every stage needs."""

    settings: DemoSettings
    cluster: ClusterConfig
    folder: Path
    console: Console
    log: RunLog
    workers: Workers
    prepared: PreparedData

    @property
    def sets(self) -> dict[str, np.ndarray]:
        """Forget, retain and holdout records."""
        partition = self.prepared.partition
        return {"forget": partition.forget_rounds[0], "retain": partition.retain(0), "holdout": partition.holdout}

    def model(self, name: str) -> ModelConfig:
        """A checkpoint of the demo by name."""
        return ModelConfig(path=str((self.folder / name).resolve()))

    def scores(self) -> dict[str, SetScores]:
        """Scores of the open model."""
        return evaluate_sets(self.workers, self.sets, 2 * self.settings.curvature.micro_batch_size)[0]

    def open(self, name: str) -> None:
        """Open a checkpoint of the demo on the workers."""
        self.workers.open_model(self.model(name), "float32", self.cluster.zero_stage)


def run_demo(settings: DemoSettings, cluster: ClusterConfig, folder: Path, overwrite: bool, console: Console) -> None:
    """Run the demo and write checkpoints, summary.json, pictures and report.html into `folder`.

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
        versions = package_versions()
        with open_group(cluster) as group:
            workers = Workers(group)
            confirm_shared(workers, folder)
            set_aside([folder / name for name in _PAPERS])  # they tell of checkpoints that go one by one from here on
            with RunLog(folder) as log:
                rows, record = _run(settings, cluster, folder, console, log, workers, versions)
    console.print(comparison_table(rows))
    console.print(f"The cubic steps ended because {record.stop_reason}.", markup=False, highlight=False)
    console.print(f"written: {folder / 'summary.json'}, {folder / 'report.html'}", markup=False, highlight=False)


def _run(
    settings: DemoSettings,
    cluster: ClusterConfig,
    folder: Path,
    console: Console,
    log: RunLog,
    workers: Workers,
    versions: dict[str, str | None],
) -> tuple[list[MethodRow], RoundRecord]:
    started = time.monotonic()
    write_people(folder / "records.jsonl", settings.num_subjects, settings.records_per_subject, settings.seed)
    _create_initial(settings, workers, folder)
    prepared = prepare_data(
        ModelConfig(path=str(folder / "initial")),
        DataConfig(path=str(folder / "records.jsonl")),
        (settings.forget,),
        settings.holdout,
    )
    workers.set_corpus(prepared.corpus)
    demo = _Demo(settings, cluster, folder, console, log, workers, prepared)
    rows, record = _compare(demo)
    summary = _summary(demo, versions, rows, record, time.monotonic() - started)
    write_json(folder / "summary.json", finite(summary))
    images = [folder / "comparison.png", folder / "steps.png"]
    comparison_figure(rows, images[0])
    steps_figure(record.steps, images[1])
    write_page(folder / "report.html", "Unlearning demo", _paragraphs(demo, rows, record), rows, [record], images)
    return rows, record


def _create_initial(settings: DemoSettings, workers: Workers, folder: Path) -> None:
    people = generate_people(settings.num_subjects, settings.records_per_subject, settings.seed)
    texts = [f"{person['question']} {person['answer']}" for person in people]
    tokenizer = train_tokenizer(texts, settings.vocab_size, settings.context_length)
    special = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    with complete_folder(folder / "initial", overwrite=True) as staging:
        architecture: ArchitectureSettings = {**settings.architecture, **special}
        workers.create_checkpoint("llama", architecture, str(staging.resolve()), settings.seed)
        tokenizer.save_pretrained(staging)


def _compare(demo: _Demo) -> tuple[list[MethodRow], RoundRecord]:
    partition = demo.prepared.partition
    original, original_seconds = _train(demo, "original", partition.training)
    retrained, retrained_seconds = _train(demo, "retrained", partition.retain(0))
    demo.open("original")
    record, _ = _unlearn(demo, "cubic steps", ObjectiveConfig(), demo.settings.solver)
    with complete_folder(demo.folder / "unlearned", overwrite=True) as staging:
        demo.workers.export(str(staging.resolve()), demo.model("original"), SaveConfig())
    rows = [
        MethodRow("original", original, tug_of_war(original, retrained), original_seconds, 0),
        _row("unlearned (SCureNewton)", record, retrained),
    ]
    for baseline in baselines():
        rows.append(_run_baseline(demo, baseline, record, rows[1], retrained))
    rows.append(MethodRow("retrained (the reference)", retrained, 1.0, retrained_seconds, 0))
    return rows, record


def _row(name: str, record: RoundRecord, retrained: dict[str, SetScores]) -> MethodRow:
    score = tug_of_war(record.after, retrained)
    return MethodRow(name, record.after, score, record.wall_seconds, record.num_products)


def _train(demo: _Demo, name: str, indices: np.ndarray) -> tuple[dict[str, SetScores], float]:
    settings, progress = demo.settings, TrainingProgress(demo.console, f"training the {name} model")

    def on_step(step: int, loss: float) -> None:
        progress.update(step, loss)
        demo.log.log(f"train_{name}", step, {"loss_nats_per_token": loss})

    task = TrainingTask(
        spec=TrainingSpec(
            model=demo.model("initial"),
            train=settings.train,
            indices=indices,
            zero_stage=settings.train.stage_in(demo.cluster),
            micro_batch_size=settings.curvature.micro_batch_size,
            seed=settings.seed,
        ),
        destination=(demo.folder / name).resolve(),
        save=SaveConfig(),
        overwrite=True,
        on_start=progress.start,
        on_step=on_step,
    )
    started = time.monotonic()
    try:
        run_training(demo.workers, task)
        write_trained(demo.workers, task)
    finally:
        progress.stop()
    seconds = time.monotonic() - started
    demo.console.print(f"trained the {name} model in {seconds:.1f} s", markup=False, highlight=False)
    return demo.scores(), seconds


def _unlearn(
    demo: _Demo, name: str, objective: ObjectiveConfig, solver: SolverConfig
) -> tuple[RoundRecord, float | None]:
    """One round from the original weights; also the seconds until the stopping rule's conditions first held."""
    matched: list[float] = []
    stop, seconds = solver.stop, [0.0]
    sets = demo.sets
    total = solver.max_steps if stop.max_seconds is None else None
    with RoundProgress(demo.console, total, name) as progress:

        def on_step(record: StepRecord, extra: dict[str, float]) -> None:
            progress.update(record, extra)
            demo.log.log(name, record.step, {**asdict(record), **extra})
            seconds[0] += record.wall_seconds
            if "retain probe excess" in extra and extra["retain probe excess"] <= stop.retain_tolerance_nats:
                matched.append(seconds[0])

        record = run_round(
            demo.workers,
            RoundTask(
                0,
                sets["forget"],
                sets["retain"],
                sets["holdout"],
                objective,
                solver,
                demo.settings.curvature,
                on_step=on_step,
            ),
        )
    return record, matched[0] if matched else None


def _run_baseline(
    demo: _Demo, baseline: Baseline, cubic: RoundRecord, cubic_row: MethodRow, retrained: dict[str, SetScores]
) -> MethodRow:
    """A first-order method from the original weights for at least the wall time of the cubic steps."""
    demo.open("original")
    same = baseline.objective.name == "holdout_matched"
    never = 1 << 30
    stop = demo.settings.solver.stop.model_copy(
        update={
            "forget_matches_holdout": same,
            "check_every_steps": 10,
            "patience": never,  # the conditions are watched, but only the clock ends the run
            "max_seconds": cubic.wall_seconds,
        }
    )
    solver = demo.settings.solver.model_copy(
        update={"method": "adamw", "learning_rate": baseline.learning_rate, "max_steps": never, "stop": stop}
    )
    record, matched = _unlearn(demo, baseline.name, baseline.objective, solver)
    row = _row(baseline.name, record, retrained)
    if not same:
        return row
    assert row.tug_of_war is not None and cubic_row.tug_of_war is not None
    notes = [f"learning rate {baseline.learning_rate:g}"]
    if row.tug_of_war > cubic_row.tug_of_war:
        notes.append(f"better than the cubic steps by {row.tug_of_war - cubic_row.tug_of_war:.3f} at equal time")
    if matched is not None and matched < cubic.wall_seconds:
        notes.append(f"faster: met the stopping rule after {matched:.1f} s")
    return replace(row, note="; ".join(notes))


def _paragraphs(demo: _Demo, rows: list[MethodRow], record: RoundRecord) -> list[str]:
    counts = {name: len(indices) for name, indices in demo.sets.items()}
    notes = [f"{row.name}: {row.note}." for row in rows if row.note]
    return [
        f"{counts['forget']} records of {demo.settings.num_forget_subjects} people were forgotten, {counts['retain']} "
        f"retained, {counts['holdout']} never trained on. Two models can be compared: the one retrained without the "
        "forgotten records and the unlearned one; Tug-of-War is 1 when they memorise all three sets equally.",
        f"The cubic steps ended because {record.stop_reason}.",
        *notes,
    ]


def _summary(
    demo: _Demo, versions: dict[str, str | None], rows: list[MethodRow], record: RoundRecord, seconds: float
) -> dict[str, Any]:
    settings = asdict(demo.settings)
    for name in ("train", "solver", "curvature"):
        settings[name] = json.loads(getattr(demo.settings, name).model_dump_json())
    return {
        "format": 1,
        "settings": settings,
        "cluster": demo.cluster.model_dump(mode="json"),
        "versions": versions,
        "methods": [asdict(row) for row in rows],
        "round": asdict(record),
        "wall_seconds": seconds,
    }
