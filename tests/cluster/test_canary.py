"""Text of records is nowhere when a run has ended: outputs, logs, Ray's session, shared memory or temporary files.

A word that occurs in one answer alone, and one that is an id, are looked for in every file that a run could have
written, after a success, a failure and a kill of the driver. The ids of erased records are nowhere either, but for the
job file and the records themselves.
"""

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from processes import Running, command_line, started
from tiny_job import TinyJob

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800, method="signal"),
    pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="fewer processors than workers"),
]

TEXT, ERASED, OTHER = "zanzibarium", "subject-of-erasure", "another-subject"
"""A word of an answer; parts of ids: of a record to be erased, of one that stays."""


@dataclass(frozen=True)
class Canary:
    """A job whose records hold words that occur nowhere else on this machine."""

    folder: Path

    @property
    def job(self) -> Path:
        return self.folder / "job.yaml"

    @property
    def temporary(self) -> Path:
        return self.folder / "temporary"

    def run(self, max_steps: int, *overrides: str) -> list[str]:
        paths = (f"output={self.folder / 'out'}", f"solver.max_steps={max_steps}")
        return command_line("run", str(self.job), "--allow-incomplete", *paths, *overrides)

    def places(self, running: Running) -> list[Path]:
        """Where a run could write, in the test's own folders and in what all runs share."""
        return [self.folder / "out", running.folder, running.scratch, self.temporary, Path("/dev/shm")]


@pytest.fixture
def canary(tiny: TinyJob, tmp_path: Path) -> Canary:
    """Ten people, of whom one is erased by an ids file that only its owner reads; two workers on a local Ray."""
    found = Canary(tmp_path)
    found.temporary.mkdir()
    rows = tiny.rows()
    for row in rows:
        erased = row["subject_id"] == "person-0000"
        row["record_id"] = f"{ERASED if erased else OTHER}-{row['record_id']}"
        row["answer"] = f"{TEXT} {row['answer']}"
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ids = tmp_path / "ids.txt"
    ids.touch(mode=0o600)
    ids.write_text("".join(f"{row['record_id']}\n" for row in rows if row["record_id"].startswith(ERASED)))
    tree = yaml.safe_load(tiny.job.read_text())
    tree["data"]["path"], tree["forget"] = str(tmp_path / "records.jsonl"), {"ids_file": str(ids)}
    tree["cluster"] |= {"backend": "ray", "num_workers": 2}
    tree["save"] = {"state_every_steps": 1}
    found.job.write_text(yaml.safe_dump(tree))
    return found


def _holding(places: list[Path], words: tuple[str, ...]) -> list[str]:
    """Files below `places` that hold one of the words, in UTF-8 or UTF-16."""
    sought = [word.encode(encoding) for word in words for encoding in ("utf-8", "utf-16-le")]
    found = []
    for path in _files(places):
        try:
            content = path.read_bytes()
        except OSError:
            continue  # gone since, a socket, or another user's
        found += [f"{path}: {word!r}" for word in sought if word in content]
    return found


def _files(places: list[Path]) -> Iterator[Path]:
    for place in places:
        yield from (path for path in place.rglob("*") if path.is_file() and not path.is_symlink())


def _run(canary: Canary, max_steps: int, *overrides: str):
    """The job with a temporary folder of its own, and Ray's below a folder of the test."""
    command = canary.run(max_steps, *overrides)
    return started(command, canary.folder / "here", {"TMPDIR": str(canary.temporary)})


def _assert_no_text(canary: Canary, running: Running) -> None:
    assert running.survivors(patience_seconds=60) == []
    assert _holding(canary.places(running), (TEXT, ERASED, OTHER)) == []


def test_the_search_finds_what_is_there(canary: Canary, tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "log").write_bytes(b"\0\1" + f"x{TEXT}y".encode())
    assert len(_holding([tmp_path / "here"], (TEXT, ERASED))) == 1
    assert {Path(line.split(":")[0]).name for line in _holding([tmp_path], (TEXT, ERASED))} == {
        *("log", "records.jsonl", "ids.txt")
    }


def test_after_a_success(canary: Canary):
    with _run(canary, 2) as running:
        assert running.wait(900) == 0, running.err
        assert (canary.folder / "out" / "checkpoint" / "model.safetensors").exists()
        _assert_no_text(canary, running)


def test_after_a_failure_and_a_killed_driver(canary: Canary):
    """A worker that dies leaves Ray's logs; a driver that is killed leaves the state to go on from."""
    with _run(canary, 100_000, "cluster.max_restarts=0") as running:
        metrics = canary.folder / "out" / "metrics.jsonl"
        running.wait_until(lambda: metrics.exists() and metrics.read_text().count("/step") >= 2, 900)
        running.actors()[0].kill()
        assert running.wait(300) == 8
        assert list(running.scratch.glob("ray-*/session_2*/logs/*"))
        _assert_no_text(canary, running)
    with _run(canary, 100_000, "resume=true", "overwrite=true") as running:
        running.wait_until(lambda: metrics.read_text().count("/step") >= 2, 900)
        running.process.send_signal(signal.SIGKILL)
        running.wait(60)
        assert list((canary.folder / "out" / "state").glob("round_1_step_*"))
        _assert_no_text(canary, running)
