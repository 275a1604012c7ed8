"""The referee: which steps, on which objective, come near a retrained model soonest.

    python benchmarks/race.py --short                      # problem 1 (the demo), one seed
    python benchmarks/race.py --folder runs/race           # three seeds, all contestants, into benchmarks/results/

Every contestant starts from the same checkpoint, and all of one problem take turns in one process, one thread, so
that noise hits all alike. A *unit* is the CPU time of one gradient of the minibatch, measured in the same process; at
fixed numbers of units each model is compared with one that was retrained without the forgotten people:

- Tug-of-War, exact memorisation on forget, retain and holdout (`evaluation.metrics.tug_of_war`);
- Jensen-Shannon divergence of the next-token distributions on answer positions, nats, mean over tokens, by set; its
  noise floor is the divergence between two retrained models of different seeds.

The rule: settings are chosen on seed 0 of the demo and reported on the other seeds. The last line of the output is one
JSON object with, for every contestant, the final `tug_of_war` and `js_forget` and the seconds and units it took to a
Tug-of-War of 0.95 and 0.98 (null: never within the budget); means over the seeds that were run.
"""

import argparse
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

from judge import SETS, Judge, OneWorker, Problem, load  # noqa: E402

from distributed_unlearn.commands.run import run_job  # noqa: E402
from distributed_unlearn.config import (  # noqa: E402
    AdamWConfig,
    ClusterConfig,
    CurvatureConfig,
    ModelConfig,
    ObjectiveConfig,
    SCureNewtonConfig,
    SgdConfig,
    SolverConfig,
)
from distributed_unlearn.data.prepare import prepare_data  # noqa: E402
from distributed_unlearn.demo.jobs import DemoJobs  # noqa: E402
from distributed_unlearn.demo.run import create_initial  # noqa: E402
from distributed_unlearn.demo.settings import demo_settings  # noqa: E402
from distributed_unlearn.objectives.build import build_objective  # noqa: E402
from distributed_unlearn.provenance import package_versions  # noqa: E402
from distributed_unlearn.rounds.evaluate import evidence  # noqa: E402
from distributed_unlearn.rounds.methods import build_solver  # noqa: E402
from distributed_unlearn.rounds.opening import Unseen, drawn_retain_records, opening_constants  # noqa: E402
from distributed_unlearn.workers.client import (
    RemoteOracle,  # noqa: E402
    Workers,  # noqa: E402
)
from distributed_unlearn.workers.messages import RoundSpec  # noqa: E402

MOST_STEPS = 400


@dataclass(frozen=True)
class Contestant:
    """What is minimised and how."""

    name: str
    objective: ObjectiveConfig
    solver: SolverConfig
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
    """The defaults, today's defaults, and first-order methods at several rates on the same objective."""
    batches = {"gradient_batch": problem.gradient_batch, "max_steps": MOST_STEPS, "seed": problem.seed}
    token, mean = ObjectiveConfig(name="token_matched"), ObjectiveConfig(name="holdout_matched")

    former = {
        "inner": "krylov",
        "metric": "identity",
        "cubic_coefficient": 100.0,
        "max_krylov_steps": 2,
        "curvature_batch": problem.gradient_batch // 3,
    }

    def adamw(rate: float) -> AdamWConfig:
        return AdamWConfig(method="adamw", learning_rate=rate, **batches)

    def cubic(**settings: object) -> SCureNewtonConfig:
        chosen = {**batches, "curvature_batch": problem.curvature_batch, **settings}
        return SCureNewtonConfig.model_validate(chosen)

    found = [
        Contestant("scurenewton", token, cubic()),
        Contestant("scurenewton-1.0", mean, cubic(**former), "hessian"),
        *(Contestant(f"adamw {rate:g}", token, adamw(rate)) for rate in (1e-4, 3e-4, 1e-3, 3e-3)),
    ]
    if short:
        return found
    found += [
        Contestant(f"sgd {rate:g}", token, SgdConfig(method="sgd", learning_rate=rate, momentum=0.9, **batches))
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
        self._group, workers = group, Workers(group)
        workers.set_corpus(problem.data.corpus)
        workers.open_model(ModelConfig(path=problem.original), "float32", 0)
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
        war, js, memorised, loss = judge.look(self._group.worker.opened)
        self.course.points.append(
            Point(self._cpu / gradient_seconds, self._wall, self._steps, war, js, memorised, loss)
        )


def gradient_cost(problem: Problem) -> float:
    """Median CPU seconds of a step of SGD that moves nothing: a gradient on the token objective, and little beside."""
    solver = SgdConfig(method="sgd", learning_rate=1e-30, gradient_batch=problem.gradient_batch, max_steps=MOST_STEPS)
    runner = Runner(Contestant("gradient", ObjectiveConfig(name="token_matched"), solver), problem)
    runner.step()
    return statistics.median(runner.step() for _ in range(5))


def demo_problem(folder: Path, seed: int, with_floor: bool) -> Problem:
    """The demo's people and checkpoints of one seed, trained here unless `folder` has them already."""
    settings, cluster = demo_settings(seed, short=False), ClusterConfig(backend="in_process", num_workers=1)
    jobs = DemoJobs(settings, cluster, folder)
    if not (folder / "initial").exists():
        folder.mkdir(parents=True, exist_ok=True)
        create_initial(settings, Workers(OneWorker()), folder)
    again = "retrained_again" if with_floor else None
    for name in ("original", "retrained", again):
        if name is not None and not (folder / name / "checkpoint").exists():
            print(f"training {name} of seed {seed}", flush=True)
            job = jobs.training(name, exclude_forget=name != "original")
            seeds = {"seed": seed + 1000} if name == again else {}
            run_job(job.model_copy(update={"solver": job.solver.model_copy(update=seeds)}))
    job = jobs.unlearning("none")
    return Problem(
        data=prepare_data(job.model, job.data, job.forget_rounds, job.holdout),
        original=jobs.checkpoint("original"),
        retrained=jobs.checkpoint("retrained"),
        retrained_again=None if again is None else jobs.checkpoint(again),
        seed=seed,
        gradient_batch=settings.solver.gradient_batch,
        curvature_batch=settings.solver.curvature_batch,
        micro_batch_size=settings.curvature.micro_batch_size,
    )


def race(problem: Problem, chosen: Sequence[Contestant], units: Sequence[float], most: int | None) -> list[Course]:
    """All contestants to every checkpoint in turn."""
    judge, cost = Judge(problem, most), gradient_cost(problem)
    runners = [Runner(contestant, problem) for contestant in chosen]
    for checkpoint in units:
        for runner in runners:
            runner.run_until(checkpoint, cost)
            runner.report(judge, cost)
            point = runner.course.points[-1]
            print(f"seed {problem.seed}  {runner.course.contestant:24s} {point.line()}", flush=True)
    if problem.retrained_again is not None:
        war, js, _, _ = judge.look(load(problem.retrained_again))
        print(f"seed {problem.seed}  retrained, other seed: ToW {war:.3f}  JS {js}", flush=True)
        floor = Course("retrained, other seed", problem.seed)
        floor.points.append(Point(math.nan, math.nan, 0, war, js, {}, math.nan))
        return [*(runner.course for runner in runners), floor]
    return [runner.course for runner in runners]


def _mean(values: Sequence[float | None]) -> float | None:
    """Over the seeds; None where one of them never got there."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def summary(courses: Sequence[Course]) -> dict[str, dict[str, float | None]]:
    """Every contestant's last point and its times, means over the seeds."""
    found = {}
    for name in dict.fromkeys(course.contestant for course in courses):
        mine = [course for course in courses if course.contestant == name]
        found[name] = {
            "tug_of_war": _mean([course.points[-1].tug_of_war for course in mine]),
            "js_forget": _mean([course.points[-1].js["forget"] for course in mine]),
            "seconds_to_0_95": _mean([course.first(0.95, "wall_seconds") for course in mine]),
            "seconds_to_0_98": _mean([course.first(0.98, "wall_seconds") for course in mine]),
            "units_to_0_98": _mean([course.first(0.98, "units") for course in mine]),
        }
    return found


def draw(courses: Sequence[Course], path: Path) -> None:
    """Tug-of-War against units, one line a contestant, band over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(course.contestant for course in courses if len(course.points) > 1):
        mine = [course for course in courses if course.contestant == name]
        count = min(len(course.points) for course in mine)
        units = np.array([[p.units for p in course.points[:count]] for course in mine]).mean(0)
        values = np.array([[p.tug_of_war for p in course.points[:count]] for course in mine])
        axes.plot(units, values.mean(0), label=name)
        axes.fill_between(units, values.min(0), values.max(0), alpha=0.15)
    axes.set(xlabel="units (gradients of the minibatch, CPU time)", ylabel="Tug-of-War", ylim=(0.6, 1.0))
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run the problems that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="one seed, six contestants, 30 units")
    parser.add_argument("--seeds", type=int, nargs="+", default=None)
    parser.add_argument("--units", type=float, nargs="+", default=None, help="checkpoints")
    parser.add_argument("--only", nargs="+", default=None, help="contestants by name")
    parser.add_argument("--folder", type=Path, default=Path("runs/race"), help="checkpoints, a folder a seed")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    seeds = arguments.seeds or ([0] if arguments.short else [0, 1, 2])
    units = arguments.units or ([5, 10, 20, 30] if arguments.short else [5, 10, 15, 20, 25, 30, 40, 50])
    courses: list[Course] = []
    for seed in seeds:
        problem = demo_problem(arguments.folder / f"demo{seed}", seed, with_floor=not arguments.short)
        chosen = [c for c in contestants(problem, arguments.short) if not arguments.only or c.name in arguments.only]
        courses += race(problem, chosen, units, most=100 if arguments.short else None)
    arguments.output.mkdir(parents=True, exist_ok=True)
    facts = {"date": time.strftime("%Y-%m-%d"), "machine": platform.machine(), "packages": package_versions()}
    found = {"problem": "demo", **facts, "courses": [asdict(course) for course in courses], "summary": summary(courses)}
    name = "race-short" if arguments.short else "race"
    (arguments.output / f"{name}.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    draw(courses, arguments.output / f"{name}.png")
    print(json.dumps(summary(courses)))


if __name__ == "__main__":
    main()
