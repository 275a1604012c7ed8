"""`plan` says what a job needs from the configuration and tokenizer alone: no weights, no workers, no files."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from command_line import succeed
from tiny_job import TinyJob
from transformers import AutoModelForCausalLM, LlamaConfig

from distributed_unlearn.config import ModelConfig
from distributed_unlearn.engine.estimate import estimate_training_memory, measure_model


def _tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(autouse=True)
def no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def refuse(*arguments: object) -> Iterator[None]:
        raise AssertionError("a worker was started")
        yield

    monkeypatch.setattr("distributed_unlearn.commands.run.open_group", refuse)


def _row(out: str, name: str) -> str:
    return next(line for line in out.splitlines() if name in line)


def test_plan_writes_nothing_and_reads_no_weights(tiny: TinyJob, tmp_path, capsys, monkeypatch):
    num_parameters = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tiny.model).parameters())
    model = tiny.copy_model(tmp_path / "model")
    weights = model / "model.safetensors"
    content = weights.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    weights.write_bytes(content[:header] + b"\xff" * (len(content) - header))  # names and shapes, and not a number
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


def test_plan_of_a_training_job_is_about_training(tiny: TinyJob, tmp_path, capsys):
    train = "train={epochs: 2, batch_size: 5, exclude_forget: true, zero_stage: 2}"
    _, *arguments = tiny.run(tmp_path / "out", train, "cluster.backend=ray", "cluster.num_workers=2")
    out = succeed(capsys, ["plan", *arguments]).out
    assert "the job is valid" in out and "products" not in out and not (tmp_path / "out").exists()
    assert "stage 2" in _row(out, "memory a rank") and "optimizer states" in out
    assert " 9 " in _row(out, "training records")  # 12 less the 3 to forget
    assert " 4 " in _row(out, "training steps") and "5 records each" in _row(out, "training steps")


@pytest.mark.parametrize(
    ("stage", "bytes_per_parameter"), [(0, (4, 4, 8)), (1, (4, 4, 6)), (2, (4, 2, 6)), (3, (2, 2, 6))]
)
def test_training_memory_by_stage_on_two_ranks(stage, bytes_per_parameter):
    """Rajbhandari et al. 2020, figure 1, in float32: K = 8, and 12 where a copy of the weights is partitioned too."""
    config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=512)
    size = measure_model(ModelConfig(path="unused"), config, 2, stage)
    found = estimate_training_memory(size, config, torch.float32, stage, 4, 32)
    parts = (found.weights, found.gradients, found.optimizer_states)
    assert parts == tuple(size.num_parameters * count for count in bytes_per_parameter)
    assert found.total == sum(parts) + found.activations
    # Per layer and token 12 * 64 + 4 * 128 + 3 * 32 heads * 32 tokens, and three float32 logits.
    assert found.activations == 4 * 4 * 32 * (2 * (12 * 64 + 4 * 128 + 3 * 32 * 32) + 3 * 512)
