"""The harness ends what hangs, and the collectives do what their docstrings say."""

import os
import time

import pytest

from tests.engine.compare import Results
from tests.engine.ranks import RanksFailedError, run_on_ranks

PROGRAMS = "tests.engine.small_programs"


def no_process_left(folder):
    """No process on this machine that was started for this folder."""
    for entry in os.listdir("/proc"):
        try:
            with open(f"/proc/{entry}/cmdline", "rb") as file:
                if str(folder).encode() in file.read():
                    return False
        except OSError:  # not a process, or one that has just ended
            continue
    return True


def test_results_come_back_in_rank_order(tmp_path):
    assert run_on_ranks(f"{PROGRAMS}:sum_of_ranks", 2, tmp_path / "run", 0.5) == [(0, 2.0), (1, 2.0)]


@pytest.mark.parametrize(
    ("program", "message"), [("one_rank_raises", "rank one has had enough"), ("one_rank_dies", "exit code -6")]
)
def test_a_rank_that_fails_ends_the_others(program, message, tmp_path):
    started = time.monotonic()
    with pytest.raises(RanksFailedError, match=message):
        run_on_ranks(f"{PROGRAMS}:{program}", 2, tmp_path / "run")
    assert time.monotonic() - started < 90
    assert no_process_left(tmp_path)


def test_a_hang_ends_at_the_timeout(tmp_path):
    with pytest.raises(RanksFailedError, match="no end after 2"):
        run_on_ranks(f"{PROGRAMS}:sleeps", 2, tmp_path / "run", timeout_seconds=2)
    assert no_process_left(tmp_path)


def test_sections_before_a_failure_are_kept(tmp_path):
    results = Results(tmp_path, lambda size, folder: run_on_ranks(f"{PROGRAMS}:fails_in_its_second_section", 2, folder))
    assert results.of(2, "first") == [0, 1]
    with pytest.raises(RanksFailedError, match="had enough"):
        results.of(2, "second")


def test_collectives(tmp_path):
    for rank, found in enumerate(run_on_ranks(f"{PROGRAMS}:collectives", 3, tmp_path / "run")):
        assert found == {
            "gathered": [0, 1, 10, 11, 20, 21],
            "scattered": [6 * 2 * rank, 6 * (2 * rank + 1)],  # 1 + 2 + 3 = 6
            "moved": 12,
            "sum": [30, 33],
            "maximum": [20, 21],
            "untouched": True,
            "one is false": False,
            "all true": True,
            "objects": [{"rank": 0}, {"rank": 1}, {"rank": 2}],
        }
