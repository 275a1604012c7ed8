"""The race's contestants: what each minimises and how, and its course from the problem's checkpoint on."""

import math
import statistics
import time
from dataclasses import dataclass, field

from judge import SETS, Judge, OneWorker, Problem

from distributed_unlearn.config import (
    AdamWConfig,
    CurvatureConfig,
    ObjectiveConfig,
    SCureNewtonConfig,
    SgdConfig,
    SteppingConfig,
)
from distributed_unlearn.objectives.build import build_objective
from distributed_unlearn.rounds.evaluate import evidence
from distributed_unlearn.rounds.methods import build_solver
from distributed_unlearn.rounds.opening import Unseen, drawn_retain_records, opening_constants
from distributed_unlearn.workers.client import RemoteOracle, Workers
from distributed_unlearn.workers.messages import RoundSpec

MOST_STEPS = 400
RATES = (1e-4, 3e-4, 1e-3, 3e-3)
"""AdamW's."""


@dataclass(frozen=True)
class Contestant:
    """What is minimised and how."""

    name: str
    objective: ObjectiveConfig
    solver: SteppingConfig
    product: str = "gauss_newton"


@dataclass
class Point:
    """One contestant after so many units."""

    units: float
    wall_seconds: float
    num_steps: int
    tug_of_war: float
    js: dict[str, float]
    memorised: dict[str, float]
    retain_loss: float

    def line(self) -> str:
        """For the terminal."""
        js = " ".join(f"{name} {self.js[name]:.3f}" for name in SETS)
        memorised = " ".join(f"{name} {self.memorised[name]:.3f}" for name in SETS)
        start = f"{self.units:5.1f} units {self.num_steps:3d} steps  ToW {self.tug_of_war:.3f}"
        return f"{start}  JS {js}  memorised {memorised}"


@dataclass
class Course:
    """Everything that is known of one contestant on one problem."""

    contestant: str
    seed: int
    points: list[Point] = field(default_factory=list)
    failure: str | None = None

    def first(self, level: float, of: str) -> float | None:
        """Units or wall seconds at the first point with this Tug-of-War; None: never."""
        return next((float(getattr(point, of)) for point in self.points if point.tug_of_war >= level), None)


def contestants(problem: Problem, short: bool) -> list[Contestant]:
    """The defaults, the defaults of version 1.0, and first-order methods at several rates on the same objective."""
    batches = {"max_steps": MOST_STEPS, "seed": problem.seed}
    same, mean = problem.objective, ObjectiveConfig(name="holdout_matched")
    former = {
        "inner": "krylov",
        "metric": "identity",
        "cubic_coefficient": 100.0,
        "max_krylov_steps": 2,
        "curvature_batch": 16,
    }

    def adamw(rate: float) -> AdamWConfig:
        return AdamWConfig(method="adamw", learning_rate=rate, **batches)

    found = [
        Contestant("scurenewton", same, SCureNewtonConfig.model_validate(batches)),
        Contestant("scurenewton-1.0", mean, SCureNewtonConfig.model_validate({**batches, **former}), "hessian"),
        *(Contestant(f"adamw {rate:g}", same, adamw(rate)) for rate in RATES),
    ]
    if short:
        return found
    found += [
        Contestant(f"sgd {rate:g}", same, SgdConfig(method="sgd", learning_rate=rate, momentum=0.9, **batches))
        for rate in (1e-3, 1e-2, 1e-1)
    ]
    return found + [
        Contestant(f"{name} (adamw 3e-4)", ObjectiveConfig(name=name), adamw(3e-4))
        for name in ("npo", "simnpo", "undial")
    ]


class Runner:
    """One contestant on its way."""

    def __init__(self, contestant: Contestant, problem: Problem) -> None:
        self.course = Course(contestant.name, problem.seed)
        group = OneWorker()
        self.group, workers = group, Workers(group)
        workers.set_corpus(problem.data.corpus)
        workers.open_model(problem.model, "float32", 0)
        partition, solver, size = problem.data.partition, contestant.solver, problem.micro_batch_size
        forget, retain, holdout = partition.forget_rounds[0], partition.retain(0), partition.holdout
        unseen = Unseen(evidence(workers, holdout, size))
        assert unseen.holdout is not None
        holdout_loss = float(unseen.holdout.nll.mean())
        objective = build_objective(contestant.objective, holdout_loss)
        drawn = drawn_retain_records(objective, solver, 0, retain)
        constants = opening_constants(workers, objective, forget, drawn, unseen, size)
        curvature = CurvatureConfig(product=contestant.product, micro_batch_size=size, memory_budget_gib=2.0)
        workers.begin_round(
            RoundSpec(0, forget, retain, contestant.objective, solver, curvature, holdout_loss, constants)
        )
        self._solver = build_solver(RemoteOracle(group), solver)
        self._cpu = self._wall = 0.0
        self._steps = 0

    def step(self) -> float:
        """One step; its CPU seconds."""
        cpu, wall = time.process_time(), time.perf_counter()
        record = self._solver.step(self._steps)
        spent = time.process_time() - cpu
        self._cpu, self._wall, self._steps = self._cpu + spent, self._wall + time.perf_counter() - wall, self._steps + 1
        if not math.isfinite(record.loss):
            self.course.failure = f"loss {record.loss} at step {self._steps}"
        return spent

    def run_until(self, units: float, gradient_seconds: float) -> None:
        """Take steps until so many units are used up."""
        while self._cpu < units * gradient_seconds and self.course.failure is None and self._steps < MOST_STEPS:
            self.step()

    def report(self, judge: Judge, gradient_seconds: float) -> None:
        """Add a point."""
        war, js, memorised, loss = judge.look(self.group.worker.opened)
        self.course.points.append(
            Point(self._cpu / gradient_seconds, self._wall, self._steps, war, js, memorised, loss)
        )


def gradient_cost(problem: Problem) -> float:
    """Median CPU seconds of a step of SGD that moves nothing: a gradient of the objective, and little beside."""
    solver = SgdConfig(method="sgd", learning_rate=1e-30, max_steps=MOST_STEPS, seed=problem.seed)
    runner = Runner(Contestant("gradient", problem.objective, solver), problem)
    runner.step()
    return statistics.median(runner.step() for _ in range(5))
