"""The race's problems: records, a model trained on them, and two retrained without those to be forgotten.

Every checkpoint is a training job's, in a folder of its own; one that is there already is used as it is, so that a
race that was ended goes on, and a second one starts at once.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from judge import OneWorker, Problem

from distributed_unlearn.commands.run import run_job
from distributed_unlearn.config import (
    ClusterConfig,
    CurvatureConfig,
    DataConfig,
    JobConfig,
    LoraAdapter,
    ModelConfig,
    ObjectiveConfig,
    SCureNewtonConfig,
    SelectionConfig,
    TrainConfig,
)
from distributed_unlearn.data.prepare import prepare_data
from distributed_unlearn.demo.jobs import DemoJobs
from distributed_unlearn.demo.run import create_initial
from distributed_unlearn.demo.settings import demo_settings
from distributed_unlearn.demo.tokenizer import train_tokenizer
from distributed_unlearn.files import complete_folder
from distributed_unlearn.models.cnn import TwoLayerCNNConfig, TwoLayerCNNForImageClassification
from distributed_unlearn.workers.client import Workers

CLUSTER = ClusterConfig(backend="in_process", num_workers=1, zero_stage=0)
TOKEN = ObjectiveConfig(name="token_matched")


@dataclass(frozen=True)
class Recipe:
    """What a problem's jobs have in common; `job` trains on all records but the holdout's."""

    name: str
    job: JobConfig
    objective: ObjectiveConfig = TOKEN
    """What the contestants minimise that minimise the same."""


def demo(folder: Path, seed: int) -> Recipe:
    """(1) The demo's people, three of them to forget."""
    settings = demo_settings(seed, short=False)
    if not (folder / "initial").exists():
        create_initial(settings, Workers(OneWorker()), folder)
    jobs = DemoJobs(settings, CLUSTER, folder)
    return Recipe("demo", jobs.training("original", exclude_forget=False))


def tofu(folder: Path, seed: int, file: Path) -> Recipe:
    """(2) Thirty authors of TOFU, other ones for every seed, memorised by a model of the demo's size.

    The first three are to be forgotten, the last five held out. As in the demo the tokenizer knows other people alone:
    the last thirty of the file, which no seed below five has.
    """
    settings = demo_settings(seed, short=False)
    records = [line for line in file.read_text(encoding="utf-8").splitlines() if line]
    subjects = [json.loads(line)["subject_id"] for line in records]
    authors = list(dict.fromkeys(subjects))
    chosen, others = authors[30 * seed : 30 * (seed + 1)], set(authors[-30:])
    assert len(chosen) == 30 and not others & set(chosen), "a seed of 0 to 4"
    if not (folder / "initial").exists():
        kept = [line for line, author in zip(records, subjects, strict=True) if author in set(chosen)]
        (folder / "records.jsonl").write_text("\n".join(kept) + "\n", encoding="utf-8")
        texts = [json.loads(line) for line, author in zip(records, subjects, strict=True) if author in others]
        tokenizer = train_tokenizer(
            [f"{row['question']} {row['answer']}" for row in texts], settings.vocab_size, settings.context_length
        )
        special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
        with complete_folder(folder / "initial", overwrite=True) as staging:
            architecture = {**settings.architecture, **special, "vocab_size": len(tokenizer)}
            workers = Workers(OneWorker())
            workers.create_checkpoint("llama", architecture, str(staging.resolve()), seed, "causal_lm")
            tokenizer.save_pretrained(staging)
    job = _job(
        model=ModelConfig(path=str((folder / "initial").resolve())),
        data=DataConfig(path=str((folder / "records.jsonl").resolve())),
        forget=SelectionConfig(subjects=tuple(chosen[:3])),
        holdout=SelectionConfig(subjects=tuple(chosen[-5:])),
        train=settings.train,
        curvature=settings.curvature,
        folder=folder,
        seed=seed,
    )
    return Recipe("tofu", job)


def digits(folder: Path, seed: int, by_class: bool) -> Recipe:
    """(3) scikit-learn's digits and the two-layer CNN: a tenth of the samples to forget, or the class 3.

    What a model says of a class that it has never seen is not what it says of held-out records, so there the objective
    is DELETE, which matches nothing.
    """
    if not (folder / "initial").exists():
        torch.manual_seed(seed)
        with complete_folder(folder / "initial", overwrite=True) as staging:
            names = {number: str(number) for number in range(10)}
            config = TwoLayerCNNConfig(image_size=8, id2label=names)
            TwoLayerCNNForImageClassification(config).save_pretrained(staging)
    chosen = np.sort(np.random.default_rng(seed).permutation(1500)[:150])
    forget = SelectionConfig(record_ids=tuple(f"digit-{index:04d}" for index in chosen))
    job = _job(
        model=ModelConfig(path=str((folder / "initial").resolve()), task="image_classification"),
        data=DataConfig(path="sklearn:digits", split="train[:1500]", format="image"),
        forget=SelectionConfig(classes=(3,)) if by_class else forget,
        holdout=SelectionConfig(path="sklearn:digits", split="train[1500:]"),
        train=TrainConfig(epochs=30, batch_size=50, learning_rate=1e-2),
        curvature=CurvatureConfig(micro_batch_size=100),
        folder=folder,
        seed=seed,
    )
    if by_class:
        return Recipe("digits-class", job, ObjectiveConfig(name="delete"))
    return Recipe("digits", job)


def smollm2(folder: Path, seed: int, file: Path, model: Path) -> Recipe:
    """(4) A LoRA adapter of SmolLM2-135M on twenty authors of TOFU: two to forget, the next author held out."""
    job = _job(
        model=ModelConfig(path=str(model.resolve()), adapter=LoraAdapter(name="lora", seed=seed)),
        data=DataConfig(path=str(file.resolve()), split="train[:420]"),
        forget=SelectionConfig(subjects=("author-000", "author-001")),
        holdout=SelectionConfig(subjects=("author-020",)),
        train=TrainConfig(epochs=8, batch_size=12, learning_rate=2e-3),
        curvature=CurvatureConfig(micro_batch_size=8),
        folder=folder,
        seed=seed,
    )
    return Recipe("smollm2-lora", job)


def _job(
    model: ModelConfig,
    data: DataConfig,
    forget: SelectionConfig,
    holdout: SelectionConfig,
    train: TrainConfig,
    curvature: CurvatureConfig,
    folder: Path,
    seed: int,
) -> JobConfig:
    return JobConfig(
        model=model,
        data=data,
        forget=forget,
        holdout=holdout,
        train=train,
        solver=SCureNewtonConfig(seed=seed),
        curvature=curvature,
        cluster=CLUSTER,
        output=str((folder / "original").resolve()),
        overwrite=True,
    )


def open_problem(make: Callable[[Path, int], Recipe], name: str, folder: Path, seed: int, with_floor: bool) -> Problem:
    """A problem with its checkpoints, trained here unless `folder` has them; `with_floor`: the second retrained too."""
    folder = folder / f"{name}{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    recipe = make(folder, seed)
    names = ["original", "retrained", *(["retrained_again"] if with_floor else [])]
    paths = [_trained(recipe.job, folder, each) for each in names]
    job = recipe.job
    return Problem(
        name=name,
        model=job.model.model_copy(update={"path": paths[0], "adapter": None}),
        data=prepare_data(job.model, job.data, job.forget_rounds, job.holdout),
        objective=recipe.objective,
        retrained=paths[1],
        retrained_again=paths[2] if with_floor else None,
        seed=seed,
        micro_batch_size=job.curvature.micro_batch_size,
    )


def _trained(job: JobConfig, folder: Path, name: str) -> str:
    """The checkpoint of this name; the second retrained model differs by its seed alone."""
    target = folder / name
    if not (target / "checkpoint").exists():
        print(f"training {name} in {folder}", flush=True)
        assert job.train is not None
        seed = job.solver.seed + (1000 if name == "retrained_again" else 0)
        run_job(
            job.model_copy(
                update={
                    "train": job.train.model_copy(update={"exclude_forget": name != "original"}),
                    "solver": job.solver.model_copy(update={"seed": seed}),
                    "output": str(target.resolve()),
                }
            )
        )
    return str((target / "checkpoint").resolve())
