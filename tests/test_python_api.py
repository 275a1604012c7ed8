"""The package's own functions: the documented example runs, and what is asked of the wrong one is refused."""

import inspect
import subprocess
import sys
import textwrap

import pytest
import yaml
from tiny_job import TinyJob

import distributed_unlearn
from distributed_unlearn.config import load_job
from distributed_unlearn.errors import ConfigError, DataError

TRAIN = {"epochs": 1, "batch_size": 6, "zero_stage": 2}


def _example() -> str:
    """The indented block of the package's documentation."""
    lines = inspect.getdoc(distributed_unlearn).splitlines()
    code = [line for line in lines if line.startswith("    ") or not line.strip()]
    return textwrap.dedent("\n".join(code))


def test_the_documented_example_runs(tiny: TinyJob, tmp_path, monkeypatch, capsys):
    tree = yaml.safe_load(tiny.job.read_text())
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({**tree, "output": "out"}))
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(_example(), "example", "exec"), names)
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "GiB; forget loss " in out  # nothing but what the example prints itself
    assert (tmp_path / "out" / "checkpoint" / "model.safetensors").exists()
    assert names["record"].kind == "unlearning" and names["plan"].data.report.longest > 0


def test_a_job_may_be_a_mapping_or_a_config(tiny: TinyJob, tmp_path):
    tree = yaml.safe_load(tiny.job.read_text())
    trained = distributed_unlearn.train({**tree, "output": str(tmp_path / "trained"), "train": TRAIN})
    assert trained.kind == "training" and trained.training.scores["forget"].num_records == 3
    job = load_job(tiny.job, [f"output={tmp_path / 'out'}", f"model.path={tmp_path / 'trained' / 'checkpoint'}"])
    record = distributed_unlearn.unlearn(job)
    assert record.parent is not None and record.rounds[0].num_steps == 2


def test_the_wrong_function_is_refused(tiny: TinyJob, tmp_path):
    tree = {**yaml.safe_load(tiny.job.read_text()), "output": str(tmp_path / "out")}
    with pytest.raises(ConfigError, match="call train"):
        distributed_unlearn.unlearn({**tree, "train": TRAIN})
    with pytest.raises(ConfigError, match="call unlearn"):
        distributed_unlearn.train(tree)
    with pytest.raises(ConfigError, match="this key does not exist"):
        distributed_unlearn.plan({**tree, "other": 1})
    with pytest.raises(DataError, match="cannot be read"):
        distributed_unlearn.load_record(tmp_path)
    assert not (tmp_path / "out").exists()


def test_importing_the_package_is_light():
    program = (
        "import distributed_unlearn, sys; print(*sorted({'torch', 'ray', 'pydantic', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == ""
