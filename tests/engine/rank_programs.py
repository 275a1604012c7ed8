"""What the ranks compute; everything is handed back as plain data, compared in the parent.

One process does many cases, one after the other: starting DeepSpeed takes longer than all of them.
"""

import dataclasses
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch

from distributed_unlearn.config import CurvatureConfig, ModelConfig, SaveConfig, TrainConfig
from distributed_unlearn.curvature.linearisation import Linearisation
from distributed_unlearn.engine.communicator import Communicator
from distributed_unlearn.engine.inputs import local_micro_batches
from distributed_unlearn.engine.minibatch import note_start_logits
from distributed_unlearn.engine.worker import Worker
from distributed_unlearn.errors import UserError
from distributed_unlearn.objectives.build import build_objective
from distributed_unlearn.solvers.inner.descent import DescentSpec, InnerDescentEntry
from distributed_unlearn.solvers.inner.krylov import KrylovEntry
from distributed_unlearn.solvers.methods.scurenewton import SCureNewton
from distributed_unlearn.solvers.protocols import StepSpec
from distributed_unlearn.workers.client import RemoteOracle
from distributed_unlearn.workers.messages import TrainingSpec
from tests.engine.cases import (
    HOLDOUT_LOSS,
    KRYLOV,
    KRYLOV_STEPS,
    SETTINGS,
    TRAINABLE,
    TRAINING,
    VECTOR_SEED,
    Case,
    Plan,
    Problem,
    minibatch_of,
    round_spec,
    totals_of,
)
from tests.engine.checkpoints import NUM_RECORDS
from tests.engine.ranks import Place, join_worker
from tests.engine.solver_programs import (
    OwnWorker,
    explicit,
    first_order,
    frozen_export,
    half_precision_steps,
    refreshed,
    remembering,
    resumed_steps,
)


def run_plan(place: Place, plan: Plan) -> None:
    """Everything in the plan, section by section into a file, so that a failure keeps what was there before it.

    All ranks must call this.
    """
    worker = join_worker(place)
    worker.set_corpus(plan.corpus)
    with place.file("sections").open("wb") as file:
        for section in _sections(worker, plan, place.folder):
            pickle.dump(section, file)
            file.flush()


def _sections(worker: Worker, plan: Plan, folder: Path) -> Iterator[tuple[str, Any]]:
    for case in plan.cases:
        yield str(case), measure(worker, plan, case, with_step=True)
    for stage in plan.stages:
        yield f"scores {stage}", scores(worker, plan, stage)
        yield f"elements {stage}", elements(worker, plan, stage)
        yield f"round {stage}", whole_round(worker, plan, stage)
        yield f"modes {stage}", chosen_modes(worker, plan, stage)
        yield f"bf16 {stage}", half_precision(worker, plan, stage)
        yield f"bf16 steps {stage}", half_precision_steps(worker, plan, stage)
        yield f"first order {stage}", first_order(worker, plan, stage)
        yield f"refreshed {stage}", refreshed(worker, plan, stage)
        yield f"remembering {stage}", remembering(worker, plan, stage)
        yield f"explicit {stage}", explicit(worker, plan, stage)
        yield f"frozen export {stage}", frozen_export(worker, plan, stage, folder)
        yield f"resumed {stage}", resumed_steps(worker, plan, stage, folder)
    for stage in plan.export_stages:
        yield f"export {stage}", exports(worker, plan, stage, folder)
    for name, dtype, check in plan.checks:
        worker.open_model(ModelConfig(path=str(plan.folder / name)), dtype, 3)
        key = f"check {name} {dtype} {check.product} {check.mode} {check.reference}"
        yield key, worker.check_curvature(check)
    if plan.refuses:
        yield "refused", refusals(worker, plan)
    if plan.breaks_reductions:
        yield "broken", broken_reductions(worker, plan)
    for stage in plan.training_stages:
        yield f"training {stage}", train(worker, plan, stage)


def open_plain(worker: Worker, plan: Plan, checkpoint: str, stage: int, dtype: str = "float32") -> None:
    worker.open_model(ModelConfig(path=str(plan.folder / checkpoint)), dtype, stage)


def measure(worker: Worker, plan: Plan, case: Case, with_step: bool) -> dict[str, Any]:
    """Loss, gradient, a product, Krylov matrix and one whole step from the same weights."""
    open_plain(worker, plan, case.problem.checkpoint, case.zero_stage)
    opened = worker.opened
    vector = opened.space.random_normal(opened.weights.master, VECTOR_SEED)
    loss, gradient, _ = sweep(worker, plan, case, case.problem.gradient_batch, vector)
    _, _, hvp = sweep(worker, plan, case, case.problem.curvature_batch, vector)
    found = {"layout": opened.layout, "vector": vector, "loss": loss, "gradient": gradient, "hvp": hvp}
    worker.begin_round(round_spec(case.problem, case.micro_batch_size, case.mode))
    oracle = RemoteOracle(OwnWorker(worker))  # type: ignore[arg-type]
    found["start"] = oracle.begin_step(0, KRYLOV)
    found["columns"] = [KrylovEntry(*oracle.advance()) for _ in range(KRYLOV_STEPS)]
    if with_step:
        before = opened.weights.master.clone()
        solver = SCureNewton(oracle, SETTINGS)
        found["record"], found["coefficient"] = solver.step(0), solver.cubic_coefficient
        found["update"] = opened.weights.master - before
        found["round_update_norm"] = worker.round_update_norm()
        found["mode"] = worker.curvature_mode()
    return found


def sweep(
    worker: Worker, plan: Plan, case: Case, size: int, vector: torch.Tensor
) -> tuple[float, torch.Tensor, torch.Tensor]:
    """Loss, gradient and product on the first `size` records, all micro-batches in one pass."""
    opened, communicator = worker.opened, worker.communicator
    spec, minibatch = round_spec(case.problem), minibatch_of(case.problem, size)
    batches = local_micro_batches(
        plan.corpus,
        minibatch,
        build_objective(spec.objective, HOLDOUT_LOSS),
        spec.constants,
        communicator.rank,
        communicator.world_size,
        case.micro_batch_size,
        communicator.device,
        totals_of(plan.corpus, case.problem, minibatch),
    )
    note_start_logits(opened, opened.store, batches)
    gradient, product = torch.zeros_like(vector), torch.zeros_like(vector)
    shares = [micro.share for micro in batches]
    linearisation = Linearisation(opened.segmented, opened.store, shares, cached=case.mode == "cached")
    local = linearisation.product(vector, product, gradient)
    return float(communicator.all_reduce_sum(local.reshape(1))[0]), gradient, product


def scores(worker: Worker, plan: Plan, stage: int) -> Any:
    """Every record but one, in a muddled order, with a micro-batch that leaves some ranks less."""
    open_plain(worker, plan, "odd_llama", stage)
    muddled = np.random.default_rng(0).permutation(np.arange(1, NUM_RECORDS))
    return {"some": worker.score(muddled, 3), "none": worker.score(np.empty(0, dtype=np.int64), 3)}


def elements(worker: Worker, plan: Plan, stage: int) -> dict[str, int]:
    """What the communicator counts for one call on one micro-batch, and on as many as records (some empty)."""
    found = {}
    for share, trainable in TRAINABLE.items():
        config = ModelConfig(path=str(plan.folder / "odd_llama"), trainable=trainable)
        worker.open_model(config, "float32", stage)
        for size in (99, 1):
            counts = _elements_of_calls(worker, plan, size)
            found.update({f"{share} {name} micro {size}": count for name, count in counts.items()})
        worker.open_model(config, "bfloat16", stage)
        for size in (99, 1):
            counts = _elements_of_calls(worker, plan, size)
            found.update({f"{share} {name} micro {size}": counts[name] for name in ("exact loss", "refresh")})
    return found


def _elements_of_calls(worker: Worker, plan: Plan, micro_batch_size: int) -> dict[str, int]:
    opened, communicator, spec = worker.opened, worker.communicator, round_spec(Problem())
    batches = local_micro_batches(
        plan.corpus, minibatch_of(Problem(), 5), build_objective(spec.objective, HOLDOUT_LOSS), spec.constants,
        communicator.rank, communicator.world_size, micro_batch_size, communicator.device,
    )  # fmt: skip
    assert (len(batches) > 1) == (micro_batch_size == 1)
    shares = [micro.share for micro in batches]
    vector = torch.zeros_like(opened.weights.master)

    def linearise(cached: bool = False, keep_forward: bool = False) -> Linearisation:
        return Linearisation(opened.segmented, opened.store, shares, cached=cached, keep_forward=keep_forward)

    def moved(call: Any, *arguments: Any) -> int:
        before = communicator.num_elements_moved
        call(*arguments)
        return communicator.num_elements_moved - before

    cached = linearise(cached=True)
    return {
        "gradient cached": moved(cached.gradient, vector),
        "product cached": moved(cached.product, vector, vector.clone()),
        "gradient recompute": moved(linearise().gradient, vector),
        "gradient keep_forward": moved(linearise(keep_forward=True).gradient, vector),
        "product recompute": moved(linearise().product, vector, vector.clone()),
        "loss": moved(linearise().loss),
        "exact loss": moved(Linearisation(opened.segmented, opened.master_store, shares).loss),
        "refresh": moved(opened.weights.refresh),
    }


def whole_weights(worker: Worker) -> dict[str, torch.Tensor]:
    """What the forward pass would use, by name, gathered by DeepSpeed itself at stage 3."""
    model = worker.opened.model
    parameters = list(model.parameters())
    if hasattr(parameters[0], "ds_tensor"):
        with deepspeed.zero.GatheredParameters(parameters):
            return {name: p.detach().clone() for name, p in model.named_parameters()}
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def whole_round(worker: Worker, plan: Plan, stage: int) -> dict[str, Any]:
    """Tentative updates, undone and kept; what DeepSpeed sees of them."""
    open_plain(worker, plan, "odd_llama", stage)
    opened = worker.opened
    found: dict[str, Any] = {"layout": opened.layout, "facts": worker.opened.facts()}
    worker.begin_round(round_spec(Problem()))
    before = opened.weights.master.clone()
    oracle = RemoteOracle(OwnWorker(worker))  # type: ignore[arg-type]
    oracle.begin_step(0, KRYLOV)
    oracle.advance()
    trial = oracle.candidate(-0.3)
    found["tried"] = (trial, opened.weights.master - before, whole_weights(worker))
    found["master while tried"] = opened.weights.master.clone()
    oracle.undo()
    found["undone"] = torch.equal(opened.weights.master, before), whole_weights(worker)
    found["loss after undo"] = oracle.candidate(0.0).loss
    oracle.accept()
    found["start"] = oracle.begin_step(0, KRYLOV)
    oracle.begin_step(2, StepSpec(DescentSpec(1e-1)))
    found["descent"] = [InnerDescentEntry(*oracle.advance(1.0, 1e-2)) for _ in range(3)]
    found["descent trial"] = oracle.candidate()
    oracle.undo()
    found["restored"] = torch.equal(opened.weights.master, before), worker.round_update_norm()
    return found


def half_precision(worker: Worker, plan: Plan, stage: int) -> dict[str, Any]:
    """An update far below bfloat16's resolution, with bfloat16 compute."""
    open_plain(worker, plan, "odd_llama", stage, "bfloat16")
    opened = worker.opened
    before = opened.weights.master.clone()
    update = 1e-5 * opened.space.random_normal(before, 1)
    opened.weights.set_master(before + update)
    found = {
        "layout": opened.layout,
        "master": opened.weights.master.clone(),
        "expected": before + update,
        "changed": int((opened.weights.master != before).sum()),
        "forward": whole_weights(worker),
    }
    worker.begin_round(round_spec(Problem()))
    oracle = RemoteOracle(OwnWorker(worker))  # type: ignore[arg-type]
    start = oracle.begin_step(0, KRYLOV)
    entry = oracle.advance()
    oracle.candidate(-0.3)
    oracle.undo()
    undone = torch.equal(opened.weights.master, found["master"]), whole_weights(worker)
    return {**found, "start": start, "entry": entry, "undone": undone}


def chosen_modes(worker: Worker, plan: Plan, stage: int) -> dict[str, Any]:
    """Cached or recompute, and how many micro-batches in a pass, by budget; what the passes of a step move."""
    open_plain(worker, plan, "odd_llama", stage)
    found = {}

    def moved(call: str, *arguments: Any) -> tuple[int, Any]:
        before = worker.communicator.num_elements_moved
        result = worker.oracle_call(call, *arguments)
        return worker.communicator.num_elements_moved - before, result

    for name, budget in (("none", 1e-9), ("plenty", 1.0), ("default", None)):
        curvature = CurvatureConfig(product="hessian", mode="auto", memory_budget_gib=budget, micro_batch_size=1)
        worker.begin_round(dataclasses.replace(round_spec(Problem()), curvature=curvature))
        worker.oracle_call("begin_step", 1, KRYLOV)  # measures, too
        gradient, start = moved("begin_step", 0, KRYLOV)
        _, entry = moved("advance")
        product, _ = moved("advance")
        trial, _ = moved("candidate", 0.0, 0.0)
        counts = {"gradient": gradient, "product": product, "trial": trial}
        found[name] = worker.curvature_mode(), start, KrylovEntry(*entry), counts
    return found


def exports(worker: Worker, plan: Plan, stage: int, folder: Path) -> dict[str, Any]:
    """Updated weights as float32, in small files, and as bfloat16 with a tiny update."""
    found = {}
    for name, checkpoint, save, size in (
        ("whole", "odd_llama", SaveConfig(), 1e-2),
        ("pieces", "odd_llama", SaveConfig(max_shard_gib=2e-6), 1e-2),
        ("rounded", "odd_llama_bf16", SaveConfig(fp32_master=True), 1e-5),
        ("widened", "odd_llama_bf16", SaveConfig(dtype="float32"), 1e-5),
    ):
        open_plain(worker, plan, checkpoint, stage)
        weights, space = worker.opened.weights, worker.opened.space
        weights.set_master(weights.master + size * space.random_normal(weights.master, 2))
        target = folder / f"{name} {stage}"
        target.mkdir(exist_ok=True)
        worker.communicator.barrier()
        base = ModelConfig(path=str(plan.folder / checkpoint))
        surviving = worker.export(str(target), base, save)
        found[name] = {
            "folder": target,
            "surviving": surviving,
            "master": weights.master.clone(),
            "layout": worker.opened.layout,
        }
    return found


def _error_of(call: Any, *arguments: Any) -> tuple[str, str]:
    try:
        call(*arguments)
    except UserError as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def refusals(worker: Worker, plan: Plan) -> dict[str, Any]:
    """What must not open, and that the worker can go on afterwards."""
    found: dict[str, Any] = {}
    for name in ("nan", "pickled", "blockless", "absent", "lacking", "cut off"):
        found[name] = _error_of(open_plain, worker, plan, name, 3)
        if name != "blockless":
            found[f"{name} unsharded"] = _error_of(open_plain, worker, plan, name, 0)
    config = ModelConfig(path=str(plan.folder / "odd_llama"), trainable=("*nowhere*",))
    found["pattern"] = _error_of(worker.open_model, config, "float32", 3)
    open_plain(worker, plan, "blockless", 2)
    found["blockless facts"] = worker.opened.facts()
    open_plain(worker, plan, "odd_llama", 3)
    found["facts"] = worker.opened.facts()
    return found


@contextmanager
def _dropped(method: str) -> Iterator[None]:
    """One collective returns the local part, as if the reduction had been forgotten."""

    def local_sum(self: Communicator, values: torch.Tensor) -> torch.Tensor:
        return values.to(self.device, copy=True)

    def local_part(self: Communicator, full: torch.Tensor) -> torch.Tensor:
        return full.view(self.world_size, -1)[self.rank].clone()

    kept = getattr(Communicator, method)
    setattr(Communicator, method, {"all_reduce_sum": local_sum, "reduce_scatter": local_part}[method])
    try:
        yield
    finally:
        setattr(Communicator, method, kept)


def broken_reductions(worker: Worker, plan: Plan) -> dict[str, Any]:
    """The measurement of `measure` with a reduction left out, at stages 0 and 3."""
    found = {}
    for stage in (0, 3):
        case = Case(Problem(), worker.communicator.world_size, stage, 8, "recompute")
        for method in ("all_reduce_sum", "reduce_scatter"):
            with _dropped(method):
                found[f"{method} {stage}"] = measure(worker, plan, case, with_step=False)
    return found


def train(worker: Worker, plan: Plan, stage: int) -> dict[str, Any]:
    """One step, and three steps, from the same checkpoint; at stage 2 a model that asks for dropout."""
    found: dict[str, Any] = {}

    def spec_of(name: str, config: TrainConfig) -> TrainingSpec:
        return TrainingSpec(ModelConfig(path=str(plan.folder / name)), config, np.arange(NUM_RECORDS), stage, 2, 0)

    for name, num_steps in (("odd_llama", 1), ("odd_llama", 3), ("lora", 3)):
        worker.begin_training(spec_of(name, TRAINING))
        losses = [worker.train_step(step) for step in range(num_steps)]
        facts = worker.finish_training()
        found[f"{num_steps}" if name == "odd_llama" else name] = {
            "losses": losses,
            "facts": facts,
            "layout": worker.opened.layout,
            "weights": worker.opened.weights.master.clone(),
            "scores": worker.score(np.arange(NUM_RECORDS), 4),
        }
    if stage == 2:  # without blocks, so not at stage 3
        config = TRAINING.model_copy(update={"batch_size": NUM_RECORDS})
        found["dropout"] = worker.begin_training(spec_of("blockless", config)), worker.train_step(0)
        worker.finish_training()
    return found
