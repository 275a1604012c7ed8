"""The referee: which steps, on which objective, come near a retrained model soonest.

    python benchmarks/race.py --short                                 # problem 1 (the demo), one seed
    python benchmarks/race.py --tofu data/tofu/full.jsonl             # all problems, three seeds, all contestants
    python benchmarks/race.py --tofu FILE --large MODEL --problems smollm2-lora

Every contestant starts from the same checkpoint, and all of one problem take turns in one process, one thread, so
that noise hits all alike. A *unit* is the CPU time of one gradient of the minibatch, measured in the same process; at
fixed numbers of units each model is compared with one that was retrained without the forgotten records:

- Tug-of-War, exact memorisation on forget, retain and holdout (`evaluation.metrics.tug_of_war`);
- Jensen-Shannon divergence of the predicted distributions, nats, mean over predictions, by set; its noise floor is the
  divergence between two retrained models of different seeds.

Problems: `demo`, `tofu` (thirty authors memorised by a model of the demo's size; needs --tofu), `digits` (a tenth of
the samples), `digits-class` (one class), `smollm2-lora` (needs --tofu and --large). Checkpoints are trained once into
--folder, and a problem's result of a seed is kept there: a race that was ended goes on where it was.

The rule: settings are chosen on seed 0 of the demo and reported on everything else; batch sizes are the defaults
everywhere. The last line of the output is one JSON object with, for every contestant (of every problem where there are
several), the final `tug_of_war` and `js_forget` and the seconds and units it took to a Tug-of-War of 0.95 and 0.98
(null: never within the budget); means over the seeds that were run.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

from contestants import Contestant, Course, Point, Runner, contestants, gradient_cost  # noqa: E402
from judge import Judge, Problem, load  # noqa: E402
from race_problems import Recipe, demo, digits, open_problem, smollm2, tofu  # noqa: E402
from race_results import FLOOR, draw, summary, table  # noqa: E402

from distributed_unlearn.files import write_json, write_text  # noqa: E402
from distributed_unlearn.provenance import package_versions  # noqa: E402

PROBLEMS = ("demo", "tofu", "digits", "digits-class", "smollm2-lora")


def race(problem: Problem, chosen: Sequence[Contestant], units: Sequence[float], most: int | None) -> list[Course]:
    """All contestants to every checkpoint in turn, then the noise floor."""
    judge, cost = Judge(problem, most), gradient_cost(problem)
    print(f"{problem.name}, seed {problem.seed}: a unit is {cost:.3f} s of CPU time", flush=True)
    runners = [Runner(contestant, problem) for contestant in chosen]
    for checkpoint in units:
        for runner in runners:
            runner.run_until(checkpoint, cost)
            runner.report(judge, cost)
            point = runner.course.points[-1]
            print(f"{problem.name} {problem.seed}  {runner.course.contestant:24s} {point.line()}", flush=True)
    courses = [runner.course for runner in runners]
    if problem.retrained_again is not None:
        war, js, memorised, loss = judge.look(load(problem.at(problem.retrained_again)))
        floor = Course(FLOOR, problem.seed, [Point(0.0, 0.0, 0, war, js, memorised, loss)])
        print(f"{problem.name} {problem.seed}  {FLOOR:24s} {floor.points[0].line()}", flush=True)
        courses.append(floor)
    return courses


def kept_courses(path: Path, key: dict[str, object]) -> list[Course] | None:
    """An earlier race of the same problem, seed, contestants and checkpoints, if there is one."""
    if not path.exists():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    if found["key"] != json.loads(json.dumps(key)):
        return None
    return [
        Course(each["contestant"], each["seed"], [Point(**point) for point in each["points"]], each["failure"])
        for each in found["courses"]
    ]


def makers(arguments: argparse.Namespace) -> dict[str, Callable[[Path, int], Recipe]]:
    """The problems that can be run with what is given; says of the others why not."""
    found: dict[str, Callable[[Path, int], Recipe]] = {}
    for name in ["demo"] if arguments.short else arguments.problems:
        if name in ("tofu", "smollm2-lora") and arguments.tofu is None:
            print(f"{name} is skipped: it needs --tofu FILE, TOFU's records as JSON lines")
        elif name == "smollm2-lora" and arguments.large is None:
            print("smollm2-lora is skipped: it needs --large MODEL, a folder with SmolLM2-135M")
        elif name == "demo":
            found[name] = demo
        elif name == "tofu":
            found[name] = partial(tofu, file=arguments.tofu)
        elif name == "smollm2-lora":
            found[name] = partial(smollm2, file=arguments.tofu, model=arguments.large)
        else:
            found[name] = partial(digits, by_class=name == "digits-class")
    return found


def one_seed(name: str, make: Callable[[Path, int], Recipe], seed: int, arguments: argparse.Namespace) -> list[Course]:
    """One problem at one seed, from an earlier race if it is the same."""
    short = arguments.short
    units = arguments.units or ([5, 10, 20, 30] if short else [5, 10, 15, 20, 25, 30, 40, 50])
    problem = open_problem(make, name, arguments.folder, seed, with_floor=not short)
    chosen = [c for c in contestants(problem, short) if not arguments.only or c.name in arguments.only]
    key: dict[str, object] = {
        "units": units,
        "most": arguments.most,
        "contestants": {c.name: [c.objective.model_dump(), c.solver.model_dump(), c.product] for c in chosen},
    }
    path = arguments.folder / f"{name}{seed}" / "race.json"
    courses = kept_courses(path, key)
    if courses is None:
        courses = race(problem, chosen, units, arguments.most)
        write_json(path, {"key": key, "courses": [asdict(course) for course in courses]})
    return courses


def main() -> None:
    """Run the problems that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="the demo, one seed, six contestants, 30 units")
    parser.add_argument("--problems", nargs="+", default=PROBLEMS, choices=PROBLEMS)
    parser.add_argument("--tofu", type=Path, default=None, help="TOFU's records as JSON lines")
    parser.add_argument("--large", type=Path, default=None, help="a folder with SmolLM2-135M")
    parser.add_argument("--seeds", type=int, nargs="+", default=None)
    parser.add_argument("--units", type=float, nargs="+", default=None, help="checkpoints")
    parser.add_argument("--most", type=int, default=100, help="records of each set that models are compared on")
    parser.add_argument("--only", nargs="+", default=None, help="contestants by name")
    parser.add_argument("--folder", type=Path, default=Path("runs/race"), help="checkpoints, a folder a seed")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    seeds = arguments.seeds or ([0] if arguments.short else [0, 1, 2])
    courses: dict[str, list[Course]] = {}
    for name, make in makers(arguments).items():
        courses[name] = [course for seed in seeds for course in one_seed(name, make, seed, arguments)]
    found = {name: summary(of_problem) for name, of_problem in courses.items()}
    arguments.output.mkdir(parents=True, exist_ok=True)
    facts = {"date": time.strftime("%Y-%m-%d"), "machine": platform.machine(), "packages": package_versions()}
    kept = {name: [asdict(course) for course in of_problem] for name, of_problem in courses.items()}
    stem = arguments.output / ("race-short" if arguments.short else "race")
    write_json(stem.with_suffix(".json"), {**facts, "seeds": seeds, "courses": kept, "summary": found})
    draw(courses, stem.with_suffix(".png"))
    write_text(stem.with_suffix(".md"), table(found) + "\n")
    print(table(found))
    print(json.dumps(found["demo"] if list(found) == ["demo"] else found))


if __name__ == "__main__":
    main()
