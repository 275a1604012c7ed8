"""Workers that are lost inside a round: it goes on by itself on new ones from its last state, not for ever."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from command_line import Outcome, assert_refused, call, succeed
from test_cli_resume import COMMON, METHODS, _assert_equal_results
from tiny_job import TinyJob

from distributed_unlearn.cluster.in_process import InProcessGroup
from distributed_unlearn.config import ClusterConfig
from distributed_unlearn.errors import WorkerError

pytestmark = pytest.mark.usefixtures("quick")
JOB = (*COMMON, *METHODS["scurenewton"], "save.state_every_steps=1")


@dataclass
class Losses:
    """Loses the workers of opening n in the middle of its step `at[n]`, or lets a worker raise there."""

    at: tuple[int, ...]
    raised: bool = False
    openings: int = 0
    steps: int = 0

    @contextmanager
    def open_group(self, config: ClusterConfig) -> Iterator["Mortal"]:
        self.openings, self.steps = self.openings + 1, 0
        yield Mortal(InProcessGroup(config), self.before)

    def before(self, method: str) -> None:
        self.steps += method == "begin_step"
        if method == "advance" and self.openings <= len(self.at) and self.steps == self.at[self.openings - 1]:
            raise WorkerError("worker 0, which died", "x", "y", raised=self.raised)


@dataclass
class Mortal:
    group: InProcessGroup
    before: Callable[[str], None]
    world_size: int = 1

    def call_all(self, method: str, *arguments: Any) -> list[Any]:
        if method == "oracle_call":
            self.before(arguments[0])
        return self.group.call_all(method, *arguments)

    def call_rank_zero(self, method: str, *arguments: Any) -> Any:
        return self.group.call_rank_zero(method, *arguments)

    def share(self, value: Any) -> Any:
        return self.group.share(value)


@pytest.fixture
def lose(monkeypatch) -> Callable[..., Losses]:
    def install(*at: int, raised: bool = False) -> Losses:
        losses = Losses(at, raised)
        monkeypatch.setattr("distributed_unlearn.commands.run.open_group", losses.open_group)
        return losses

    return install


@pytest.mark.slow
def test_a_round_that_lost_its_workers_twice_ends_as_the_undisturbed_one(tiny: TinyJob, tmp_path, capsys, lose):
    call(capsys, [*tiny.run(tmp_path / "whole", *JOB), "--allow-incomplete"])
    losses = lose(3, 4)  # in the third step of the first round; then, two steps on, in the second of the second round
    outcome = succeed(capsys, [*tiny.run(tmp_path / "cut", *JOB), "--allow-incomplete"])
    assert losses.openings == 3 and losses.steps == 3
    assert (
        "restart 1 of 3, on new workers, after step 2" in outcome.out
        and "restart 2 of 3, on new workers, after step 1" in outcome.out
    )
    _assert_equal_results(tmp_path / "whole", tmp_path / "cut")
    assert not (tmp_path / "cut" / "state").exists()


SHORT = ("solver.max_steps=2", "save.state_every_steps=1")


def _refused(capsys, tiny: TinyJob, output, *overrides: str) -> Outcome:
    outcome = call(capsys, tiny.run(output, *SHORT, *overrides))
    assert_refused(outcome, 8, "worker", "worker 0, which died")
    assert not (output / "checkpoint").exists()
    return outcome


def test_what_would_fail_again_is_not_begun_again(tiny: TinyJob, tmp_path, capsys, lose):
    # Nothing saved yet; an error of a worker's program; restarts switched off.
    assert _openings(lose(1), lambda: _refused(capsys, tiny, tmp_path / "a")) == 1
    assert _openings(lose(2, raised=True), lambda: _refused(capsys, tiny, tmp_path / "b")) == 1
    assert _openings(lose(2), lambda: _refused(capsys, tiny, tmp_path / "c", "cluster.max_restarts=0")) == 1
    # At the same step again.
    assert _openings(lose(2, 1, 1), lambda: _refused(capsys, tiny, tmp_path / "d")) == 2
    # The state of an earlier run is none of this one's, which was not asked to go on.
    assert _openings(lose(1), lambda: _refused(capsys, tiny, tmp_path / "d")) == 1


def _openings(losses: Losses, run: Callable[[], Outcome]) -> int:
    run()
    return losses.openings
