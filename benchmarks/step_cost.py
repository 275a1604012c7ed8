"""Where the time of a step goes, in gradients of the minibatch: gradient, products, trial, the rest.

    python benchmarks/step_cost.py [--folder runs/race] [--steps 8] [SETTING=VALUE ...]

The demo's problem at the default solver, or with other settings of it (`subspace_steps=2`). CPU time in one process,
one thread; a gradient alone is measured in turn with the steps. Prints one JSON line at the end.
"""

import argparse
import json
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
import yaml

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

from contestants import MOST_STEPS, Contestant, Runner  # noqa: E402
from race_problems import demo, open_problem  # noqa: E402

from distributed_unlearn.config import SCureNewtonConfig, SgdConfig  # noqa: E402

PARTS = {
    "gradient": "gradient",
    "product": "products",
    "sampled_change": "trial, curvature minibatch",
    "whole_change": "trial, the rest of the minibatch",
}
"""Methods of the objective, and what they are called here."""


def watched(call: Callable[..., object], seconds: list[float]) -> Callable[..., object]:
    """The same call, its CPU seconds noted."""

    def timed(*arguments: object, **settings: object) -> object:
        started = time.process_time()
        result = call(*arguments, **settings)
        seconds.append(time.process_time() - started)
        return result

    return timed


def main() -> None:
    """Print the split of the median step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/race"))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("settings", nargs="*", help="of the solver")
    arguments = parser.parse_args()
    problem = open_problem(demo, "demo", arguments.folder, 0, with_floor=False)
    given = {name: yaml.safe_load(value) for name, value in (each.split("=", 1) for each in arguments.settings)}
    solver = SCureNewtonConfig.model_validate({"max_steps": MOST_STEPS, **given})
    still = SgdConfig(method="sgd", learning_rate=1e-30, gradient_batch=solver.gradient_batch, max_steps=MOST_STEPS)
    alone, runner = (
        Runner(Contestant(name, problem.objective, config), problem)
        for name, config in (("gradient", still), ("steps", solver))
    )
    oracle = runner.group.worker._oracle
    assert oracle is not None
    spent: dict[str, list[float]] = defaultdict(list)
    for name in PARTS:
        setattr(oracle._minibatch, name, watched(getattr(oracle._minibatch, name), spent[name]))
    gradients, steps = [], []
    for index in range(arguments.steps + 1):
        gradients.append(alone.step())
        steps.append(runner.step())
        if index == 0:  # the first step also measures what passes keep
            gradients.clear(), steps.clear(), [each.clear() for each in spent.values()]
    unit = statistics.median(gradients)
    split = {called: sum(spent[name]) / arguments.steps / unit for name, called in PARTS.items()}
    split["the rest: vectors, small model, refresh"] = sum(steps) / arguments.steps / unit - sum(split.values())
    for called, units in split.items():
        print(f"{called:42s} {units:5.2f}")
    whole, total = len(spent["whole_change"]), sum(steps) / arguments.steps / unit
    print(f"a step {total:5.2f} gradients of {unit:.3f} s; {whole} of {arguments.steps} trials on the whole minibatch")
    print(json.dumps({"gradient_seconds": unit, "split": split, "whole_trials": whole, "steps": arguments.steps}))


if __name__ == "__main__":
    main()
