"""What the ranks compute of architectures: the built-in check, and files with the source's names."""

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distributed_unlearn.config import ModelConfig, SaveConfig
from distributed_unlearn.engine.worker import Worker
from distributed_unlearn.workers.messages import CurvatureCheck
from tests.engine.ranks import Place, join_worker


@dataclass(frozen=True)
class FamilyPlan:
    """Which checkpoints of `folder` are checked."""

    folder: Path
    names: tuple[str, ...]
    stage: int = 3


def check_families(place: Place, plan: FamilyPlan) -> None:
    """Every checkpoint's report, or what was raised. All ranks must call this."""
    worker = join_worker(place)
    with place.file("sections").open("wb") as file:
        for name in plan.names:
            try:
                found: Any = _check(worker, plan, name)
            except Exception as error:  # the test shows it; the others go on
                found = error
            pickle.dump((name, found), file)
            file.flush()


def _check(worker: Worker, plan: FamilyPlan, name: str) -> Any:
    worker.open_model(ModelConfig(path=str(plan.folder / name)), "float32", plan.stage)
    return worker.check_curvature(CurvatureCheck(batch_size=2, sequence_length=12))


@dataclass(frozen=True)
class ExportPlan:
    """Which checkpoints of `source` are written again, at which stages, into `target`."""

    source: Path
    places: tuple[tuple[str, int], ...]
    target: Path


def export_families(place: Place, plan: ExportPlan) -> None:
    """Open every checkpoint, change it a little and write it in small files. All ranks must call this."""
    worker, found = join_worker(place), {}
    for name, stage in plan.places:
        base, target = ModelConfig(path=str(plan.source / name)), plan.target / f"{name} {stage}"
        worker.open_model(base, "float32", stage)
        target.mkdir(exist_ok=True, parents=True)
        worker.communicator.barrier()
        weights, space = worker.opened.weights, worker.opened.space
        weights.set_master(weights.master + 1e-3 * space.random_normal(weights.master, 2))
        surviving = worker.export(str(target), base, SaveConfig(max_shard_gib=2e-5))
        found[name, stage] = {"surviving": surviving, "master": weights.master.clone(), "layout": worker.opened.layout}
    place.file("sections").write_bytes(pickle.dumps(found))


def open_adapters(place: Place, folder: Path) -> None:
    """An adapter on a bfloat16 base, opened in both compute dtypes and written in both forms. All ranks must call this.

    Hands back: how weights are held, the root's as gathered, and what survives of a small update; the first two of a
    float16 model of which little is trainable, too.
    """
    worker, found = join_worker(place), {}
    base = ModelConfig(path=str(folder / "lora_bf16"))
    for stage, dtype in ((0, "float32"), (3, "float32"), (3, "bfloat16")):
        worker.open_model(base, dtype, stage)
        found[stage, dtype], weights = _held_weights(worker, stage), worker.opened.weights
        if dtype == "float32":
            weights.set_master(weights.master + 0.1 * worker.opened.space.random_normal(weights.master, 2))
            for form in ("adapter", "merged"):
                target = folder / f"{form} {stage}"
                target.mkdir(exist_ok=True)
                worker.communicator.barrier()
                found[stage, form] = worker.export(str(target), base, SaveConfig(adapter=form))
    for stage in (0, 3):
        worker.open_model(ModelConfig(path=str(folder / "odd_llama_fp16"), trainable=("*norm*",)), "float32", stage)
        found["float16", stage] = _held_weights(worker, stage)
    place.file("sections").write_bytes(pickle.dumps(found))


def _held_weights(worker: Worker, stage: int) -> dict[str, Any]:
    weights, root = worker.opened.weights, worker.opened.layout.segments[0]
    held = {name: p.dtype for name, p in worker.opened.model.named_parameters() if "embed_tokens" in name}
    frozen = weights._frozen
    return {
        "held": held["model.embed_tokens.weight"] if frozen is None else frozen.dtype,
        "copies": None if stage == 3 else frozen,
        "master": weights.master.dtype,
        "used": weights.segment_weights(root)["model.embed_tokens.weight"],
        "exact": weights.master_segment_weights(root)["model.embed_tokens.weight"],
    }
