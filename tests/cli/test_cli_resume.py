"""A run that was killed goes on from its last saved state and ends, bit for bit, as if it had not been."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from command_line import assert_refused, call, succeed
from tiny_job import TinyJob

pytestmark = pytest.mark.usefixtures("quick")

ROOT = Path(__file__).resolve().parents[2]
ROUNDS = "rounds=[{subjects: [person-0000]}, {record_ids: [person-0001-00]}]"
COMMON = ("forget=null", ROUNDS, "solver.max_steps=4", "objective.name=graddiff")
STOP = "{forget_matches_holdout: true, forget_tolerance_nats: 5.0, retain_tolerance_nats: 5.0, patience: 4}"
METHODS = {
    "scurenewton": (f"solver.stop={STOP}",),
    "adamw": (f"solver={{method: adamw, gradient_batch: 6, learning_rate: 1e-3, max_steps: 4, stop: {STOP}}}",),
}


def _kill(tiny: TinyJob, output: Path, round_number: int, after_step: int, *overrides: str) -> None:
    """Run a job in a process of its own that is killed when it is told of this step, after the one before was saved."""
    arguments = tiny.run(output, *overrides)
    program = f"""
        import os, signal
        from contextlib import contextmanager
        from pathlib import Path
        from distributed_unlearn.commands.run import run_job
        from distributed_unlearn.config import load_job
        from distributed_unlearn.rounds.events import Unwatched

        class Deadly(Unwatched):
            @contextmanager
            def round(self, round_index, num_rounds, max_steps):
                def on_step(record, measured):
                    if (round_index + 1, record.step + 1) == ({round_number}, {after_step}):
                        os.kill(os.getpid(), signal.SIGKILL)
                yield on_step

        run_job(load_job(Path({arguments[1]!r}), {arguments[2:]!r}), Deadly())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    assert not (output / "checkpoint").exists() and not (output / "record.json").exists()


def _state(output: Path) -> list[str]:
    return sorted(path.name for path in (output / "state").iterdir())


def _timeless(value: Any) -> Any:
    """A record without its seconds, its random numbers and what hangs on them."""
    if isinstance(value, dict):
        skipped = ("seconds", "salt", "id", "started_at", "output", "resume", "unlearning.json")
        return {key: _timeless(item) for key, item in value.items() if not any(word in key for word in skipped)}
    return [_timeless(item) for item in value] if isinstance(value, list) else value


def _assert_equal_results(first: Path, second: Path) -> None:
    weights = [(folder / "checkpoint" / "model.safetensors").read_bytes() for folder in (first, second)]
    assert weights[0] == weights[1]
    records = [json.loads((folder / "record.json").read_text()) for folder in (first, second)]
    assert _timeless(records[0]["rounds"]) == _timeless(records[1]["rounds"])
    assert _timeless(records[0]) == _timeless(records[1])


@pytest.mark.slow
@pytest.mark.parametrize(("round_number", "method"), [(1, "adamw"), (2, "scurenewton")])
def test_a_killed_run_ends_as_the_undisturbed_one(round_number, method, tiny: TinyJob, tmp_path, capsys):
    job = (*COMMON, *METHODS[method], "save.state_every_steps=2")
    succeed_with = ("--allow-incomplete",)
    call(capsys, [*tiny.run(tmp_path / "whole", *job), *succeed_with])
    assert not (tmp_path / "whole" / "state").exists()
    _kill(tiny, tmp_path / "cut", round_number, 4, *job)
    assert _state(tmp_path / "cut") == [f"round_{round_number}_step_2"]
    outcome = succeed(capsys, [*tiny.run(tmp_path / "cut", *job, "resume=true"), *succeed_with])
    assert f"going on after step 2 of round {round_number}" in outcome.out
    _assert_equal_results(tmp_path / "whole", tmp_path / "cut")
    assert not (tmp_path / "cut" / "state").exists()
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert kinds.count("round_2/step") == 4 and kinds.count("round") == 2


@pytest.fixture(scope="module")
def killed(tiny: TinyJob, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    _kill(tiny, folder / "cut", 1, 3, *COMMON, "save.state_every_seconds=1e-9")
    assert _state(folder / "cut") == ["round_1_step_2"]
    return folder / "cut"


@pytest.fixture
def cut(killed: Path, tmp_path) -> Path:
    """Folder of a run that was killed after its second step; a copy that a test may spoil."""
    return Path(shutil.copytree(killed, tmp_path / "cut"))


def test_what_does_not_fit_is_refused_and_the_state_stays(cut: Path, tiny: TinyJob, capsys):
    def resume(*overrides: str) -> list[str]:
        return tiny.run(cut, *COMMON, "resume=true", *overrides)

    changed = (
        ("solver.cubic_coefficient=7", "of another job, base"),
        ("solver.max_steps=9", "of another job, base"),
        (f"rounds={ROUNDS.removeprefix('rounds=').replace('0001-00', '0001-01')}", "of another job, base"),
        ("cluster.zero_stage=2", "of another job, base"),
    )
    for override, text in changed:
        assert_refused(call(capsys, resume(override)), 3, "configuration", text, "take the changes back")
    rank = cut / "state" / "round_1_step_2" / "rank_0.safetensors"
    whole = rank.read_bytes()
    rank.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert_refused(call(capsys, resume()), 4, "data", "not those that were written", "start over")
    rank.write_bytes(whole)
    state = cut / "state" / "round_1_step_2" / "state.json"
    text = state.read_text()
    for spoilt in (text[: len(text) // 2], text.replace('"format": 1', '"format": 2')):
        state.write_text(spoilt)
        assert_refused(call(capsys, resume()), 4, "data", "state.json", "start over")
    scores = json.loads(text)
    scores["before"]["forget"]["loss_nats_per_token"] += 0.1
    state.write_text(json.dumps(scores))
    assert_refused(call(capsys, resume()), 3, "configuration", "scores at the start of round 1 that differ")
    state.write_text(text)
    assert not (cut / "checkpoint").exists()
    # What only says where and how to write may change; a state of the job is used whatever else happened since.
    outcome = succeed(capsys, [*resume("save.dtype=bfloat16", "cluster.call_timeout_seconds=99"), "--allow-incomplete"])
    assert "going on after step 2 of round 1" in outcome.out and not (cut / "state").exists()


def test_without_resume_it_starts_over_and_says_so(cut: Path, tiny: TinyJob, capsys):
    outcome = succeed(capsys, [*tiny.run(cut, *COMMON), "--allow-incomplete"])
    assert "an interrupted run left its state here" in outcome.out and not (cut / "state").exists()


def test_nothing_to_go_on_with_is_no_error(tiny: TinyJob, tmp_path, capsys):
    outcome = succeed(capsys, [*tiny.run(tmp_path / "out", *COMMON, "resume=true"), "--allow-incomplete"])
    assert "starts at its first step" in outcome.out
    refused = call(capsys, tiny.run(tmp_path / "x", "resume=true", "train={epochs: 1}"))
    assert_refused(refused, 3, "configuration", "resume is for rounds")
