"""`plan` says what a job needs from the configuration and tokenizer alone: no weights, no workers, no files."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import succeed
from tiny_job import TinyJob
from transformers import AutoModelForCausalLM


def _tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(autouse=True)
def no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def refuse(*arguments: object) -> Iterator[None]:
        raise AssertionError("a worker was started")
        yield

    monkeypatch.setattr("distributed_unlearn.commands.unlearn.open_group", refuse)
    monkeypatch.setattr("distributed_unlearn.commands.train.open_group", refuse)


def _row(out: str, name: str) -> str:
    return next(line for line in out.splitlines() if name in line)


def test_plan_writes_nothing_and_reads_no_weights(tiny: TinyJob, tmp_path, capsys, monkeypatch):
    num_parameters = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tiny.model).parameters())
    model = tiny.copy_model(tmp_path / "model")
    (model / "model.safetensors").write_bytes(b"no weights at all")
    monkeypatch.chdir(tmp_path)
    before = _tree(tmp_path)
    _, *arguments = tiny.run(Path("out"), f"model.path={model}", "solver.max_steps=7", "solver.max_krylov_steps=4")
    out = succeed(capsys, ["plan", *arguments]).out
    assert _tree(tmp_path) == before and not (tmp_path / "out").exists()
    assert "records: 12 trained on, to forget 3, held out 6, longest " in out
    assert f"{num_parameters:,}" in _row(out, "parameters") and f"{num_parameters:,} trainable" in out
    assert "at most 7 steps" in _row(out, "rounds") and "at most 28" in _row(out, "products a round")
    assert "GiB" in _row(out, "memory a rank") and " d " in _row(out, "communication a product")
    assert "the job is valid; nothing was loaded or written" in out


def test_plan_counts_what_is_trainable(tiny: TinyJob, tmp_path, capsys):
    _, *arguments = tiny.run(tmp_path / "out", 'model.trainable=["*.mlp.down_proj.weight"]')
    assert f"{2 * 32 * 48:,} trainable" in succeed(capsys, ["plan", *arguments]).out


def test_plan_of_more_workers_needs_less_of_each(tiny: TinyJob, tmp_path, capsys):
    found = []
    for workers in (2, 64):  # more than this machine has: a plan may be made anywhere
        overrides = ("cluster.backend=ray", f"cluster.num_workers={workers}", "solver.max_krylov_steps=40")
        _, *arguments = tiny.run(tmp_path / "out", *overrides)
        out = succeed(capsys, ["plan", *arguments]).out
        assert str(workers) in _row(out, "workers")
        found.append(float(_row(out, "  vectors").split("GiB")[0].split()[-1]))
    assert found[0] > found[1]


def test_plan_of_a_training_job(tiny: TinyJob, tmp_path, capsys):
    _, *arguments = tiny.run(tmp_path / "out", "train={epochs: 1}")
    assert "the job is valid" in succeed(capsys, ["plan", *arguments]).out
    assert not (tmp_path / "out").exists()
