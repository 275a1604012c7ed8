"""What the ranks compute of first-order steps, and of steps and files with bfloat16 compute."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distributed_unlearn.config import AdamWConfig, ModelConfig, SaveConfig, SgdConfig
from distributed_unlearn.engine.worker import Worker
from distributed_unlearn.solvers.inner.first_order import AdamWSpec, SgdSpec
from distributed_unlearn.solvers.methods.curenewton import CureNewton, CureNewtonSettings
from distributed_unlearn.solvers.methods.scurenewton import SCureNewton, SCureNewtonSettings
from distributed_unlearn.solvers.protocols import StepSpec
from distributed_unlearn.solvers.spectrum import exact_spectrum, lanczos_spectrum
from distributed_unlearn.workers.client import RemoteOracle
from tests.engine.cases import DECAY, RATES, SETTINGS, Plan, Problem, round_spec

TINY_STEPS = dataclasses.replace(SETTINGS, max_krylov_steps=2, cubic_coefficient=1e6, adaptation="factor")


REMEMBERING = SCureNewtonSettings(
    inner="subspace", metric="adam", subspace_steps=2, subspace_gradient="by_role", cubic_coefficient=1.0
)
EXPLICIT = CureNewtonSettings(cubic_coefficient=1.0)
NORMS = ("*norm*",)
"""Few enough parameters for a matrix; vectors of 9 entries, which no number of ranks divides."""


class OwnWorker:
    """A worker group of which every rank is its own driver: the scalars are the same everywhere."""

    world_size = 1

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def call_all(self, method: str, *arguments: Any) -> list[Any]:
        return [getattr(self._worker, method)(*arguments)]


def first_order(worker: Worker, plan: Plan, stage: int) -> dict[str, Any]:
    """A few steps of each first-order method, the rate another one each time."""
    found: dict[str, Any] = {}
    for method, rates in RATES.items():
        worker.open_model(ModelConfig(path=str(plan.folder / "llama")), "float32", stage)
        spec = round_spec(Problem("llama"))
        kind = {"adamw": AdamWConfig, "sgd": SgdConfig}[method]
        solver = kind(method=method, gradient_batch=spec.solver.gradient_batch)
        worker.begin_round(dataclasses.replace(spec, solver=solver))
        optimizer = {"adamw": AdamWSpec, "sgd": SgdSpec}[method](weight_decay=DECAY)
        oracle, starts = RemoteOracle(OwnWorker(worker)), []  # type: ignore[arg-type]
        for step, rate in enumerate(rates):
            starts.append(oracle.begin_step(step, StepSpec(optimizer)))
            oracle.candidate(rate)
            oracle.accept()
        weights = worker.opened.weights.master.clone()
        found[method] = {"starts": starts, "weights": weights, "layout": worker.opened.layout}
    return found


def refreshed(worker: Worker, plan: Plan, stage: int) -> dict[str, Any]:
    """Steps whose targets follow the ranks of what was last seen."""
    worker.open_model(ModelConfig(path=str(plan.folder / "odd_llama")), "float32", stage)
    spec = round_spec(Problem(objective="token_matched", options=(("order", "refreshed"),)))
    sample = np.linspace(-8.0, 0.0, 40)
    constants = dataclasses.replace(spec.constants, sample=sample)
    solver = SgdConfig(method="sgd", gradient_batch=spec.solver.gradient_batch)
    worker.begin_round(dataclasses.replace(spec, solver=solver, constants=constants))
    oracle, losses = RemoteOracle(OwnWorker(worker)), []  # type: ignore[arg-type]
    for step in range(4):
        losses.append(oracle.begin_step(step, StepSpec(SgdSpec(weight_decay=0.0))).loss)
        oracle.candidate(0.05)
        oracle.accept()
    assert worker._oracle is not None
    seen = worker._oracle.state_dict()["vectors"]["last_seen_log_odds"]
    return {"losses": losses, "seen": seen.tolist(), "start": constants.start_log_odds.tolist()}


def half_precision_steps(worker: Worker, plan: Plan, stage: int) -> dict[str, Any]:
    """Adaptive steps far below bfloat16's resolution, computed in bfloat16."""
    worker.open_model(ModelConfig(path=str(plan.folder / "odd_llama_bf16")), "bfloat16", stage)
    worker.begin_round(round_spec(Problem("odd_llama_bf16")))
    solver = SCureNewton(RemoteOracle(OwnWorker(worker)), TINY_STEPS)  # type: ignore[arg-type]
    return {"records": [solver.step(index) for index in range(3)], "layout": worker.opened.layout}


def frozen_export(worker: Worker, plan: Plan, stage: int, folder: Path) -> dict[str, Any]:
    """A float32 checkpoint of which a part is trainable, opened in bfloat16, updated and written."""
    base = ModelConfig(path=str(plan.folder / "odd_llama"), trainable=("*.mlp.*",))
    worker.open_model(base, "bfloat16", stage)
    weights, space = worker.opened.weights, worker.opened.space
    weights.set_master(weights.master + 1e-2 * space.random_normal(weights.master, 2))
    target = folder / f"frozen {stage}"
    target.mkdir(exist_ok=True)
    worker.communicator.barrier()
    surviving = worker.export(str(target), base, SaveConfig(dtype="float32"))
    return {
        "folder": target,
        "master": weights.master.clone(),
        "layout": worker.opened.layout,
        "surviving": surviving,
        "exact": worker.opened.master_store.weights(1),
        "compute": worker.opened.store.weights(1),
    }


def resumed_steps(worker: Worker, plan: Plan, stage: int, folder: Path) -> dict[str, Any]:
    """Four steps of a second round; and again from what was saved after two of them, on the base model opened anew."""
    spec = dataclasses.replace(round_spec(Problem("odd_llama")), round_index=1)
    base = ModelConfig(path=str(plan.folder / "odd_llama"))
    state = folder / f"state {stage}"
    state.mkdir(exist_ok=True)
    worker.open_model(base, "float32", stage)
    opened = worker.opened.weights.master.clone()
    worker.opened.weights.set_master(opened * 1.01)  # what a first round left
    worker.begin_round(spec)
    solver = SCureNewton(RemoteOracle(OwnWorker(worker)), SETTINGS)  # type: ignore[arg-type]
    records = [solver.step(index) for index in range(2)]
    worker.save_round(str(state))
    remembered = solver.state_dict()
    records += [solver.step(index) for index in range(2, 4)]
    whole = worker.opened.weights.master.clone(), worker.round_update_norm()

    worker.open_model(base, "float32", stage)
    worker.restore_round_start(str(state))
    restored = worker.opened.weights.master.clone()
    worker.begin_round(spec)
    solver = SCureNewton(RemoteOracle(OwnWorker(worker)), SETTINGS)  # type: ignore[arg-type]
    worker.load_round(str(state))
    solver.load_state_dict(remembered)
    again = [solver.step(index) for index in range(2, 4)]
    return {
        "start": (opened * 1.01, restored),
        "records": (records[2:], again),
        "whole": whole,
        "resumed": (worker.opened.weights.master.clone(), worker.round_update_norm()),
    }


def remembering(worker: Worker, plan: Plan, stage: int) -> dict[str, Any]:
    """Three steps that remember, and the third again in a new round with the state and the weights restored."""
    worker.open_model(ModelConfig(path=str(plan.folder / "odd_llama")), "float32", stage)
    opened, spec = worker.opened, round_spec(Problem())
    worker.begin_round(spec)
    oracle = RemoteOracle(OwnWorker(worker))  # type: ignore[arg-type]
    solver = SCureNewton(oracle, REMEMBERING)
    records = [solver.step(index) for index in range(2)]
    weights, driver = opened.weights.master.clone(), solver.state_dict()
    memory = copy.deepcopy(worker.oracle_call("state_dict"))
    records.append(solver.step(2))
    undisturbed = opened.weights.master.clone()
    opened.weights.set_master(weights)
    worker.begin_round(spec)
    worker.oracle_call("load_state_dict", memory)
    again = SCureNewton(oracle, REMEMBERING)
    again.load_state_dict(driver)
    record = again.step(2)
    return {
        "records": records,
        "weights": undisturbed,
        "layout": opened.layout,
        "resumed": torch.equal(opened.weights.master, undisturbed) and record.alpha == records[2].alpha,
        "kept": sorted(memory["vectors"]),
    }


def explicit(worker: Worker, plan: Plan, stage: int) -> dict[str, Any]:
    """One step with a Hessian that is written down."""
    worker.open_model(ModelConfig(path=str(plan.folder / "odd_llama"), trainable=NORMS), "float32", stage)
    worker.begin_round(round_spec(Problem()))
    before = worker.opened.weights.master.clone()
    oracle = RemoteOracle(OwnWorker(worker))  # type: ignore[arg-type]
    spectra = exact_spectrum(oracle, 5000), lanczos_spectrum(oracle, 2, worker.opened.space.num_entries)
    record = CureNewton(oracle, EXPLICIT).step(0)
    return {
        "record": record,
        "spectra": spectra,
        "update": worker.opened.weights.master - before,
        "layout": worker.opened.layout,
    }
