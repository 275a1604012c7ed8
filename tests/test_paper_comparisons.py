"""Every comparison of the paper is one that `compare` takes, with every change that its name stands for."""

import runpy
from pathlib import Path

import pytest

from distributed_unlearn.config.compare import load_compare

FOLDER = Path(__file__).parents[1] / "benchmarks" / "paper"
RUN = runpy.run_path(str(FOLDER / "run.py"))
KNOWN = RUN["comparisons"]("tofu.jsonl", "model")


@pytest.mark.parametrize("name", KNOWN)
def test_comparison_is_accepted(name):
    file, changes = KNOWN[name]
    found = load_compare(FOLDER / file, [*changes, f"output=runs/paper/{name}"])
    assert found.num_rounds == (5 if name.endswith("_rounds") else 1)
    assert found.output == f"runs/paper/{name}" and found.models == "runs/paper/models"
    for method in found.methods:
        job = found.unlearning(method, 7, "runs/original", "runs/reference", "out")
        assert job.unlearns and job.model.path == "runs/original" and job.retrained == "runs/reference"
        assert job.solver.seed == 7
    original, reference = (found.training(0, rounds, "out") for rounds in (0, found.num_rounds))
    assert original.train is not None and not original.train.exclude_forget and not original.forget_rounds
    assert reference.train is not None and reference.train.exclude_forget
    assert reference.forget_rounds == found.job.forget_rounds


def test_no_file_is_left_out():
    assert {file for file, _ in KNOWN.values()} == {path.name for path in FOLDER.glob("*.yaml")}
