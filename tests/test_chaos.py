"""Chaos in short: kills at fault points, before writes and at random instants, malformed inputs; and it can fail."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_short_run_kills_much_and_finds_nothing(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "chaos.py"), "--short", "--folder", str(tmp_path / "chaos")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=1700, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["kills"] >= 12 and found["malformed_inputs_refused"] >= 200 and found["violations"] == 0
    assert found["requests"] == found["requests_erased"] > 5 and found["reads"] > 10


WATCH = """
import os, sys, time
from pathlib import Path
sys.path[:0] = [{benchmarks!r}, {root!r}]
from chaos_processes import Plan, adopt_orphans, orphans, reading, run
folder = Path({folder!r})
adopt_orphans()
print(run(lambda: 7, folder / "log", Plan(), folder).code)
print(run(lambda: Path(folder, "a").write_text("x") and 0, folder / "log", Plan(file_write=0), folder).code)
print(run(lambda: Path(folder, "b").write_text("x") and 0, folder / "log", Plan(file_write=1), folder).code)
print(run(lambda: time.sleep(60) or 0, folder / "log", Plan(seconds=0.2), folder).code)
print(run(lambda: time.sleep(60) or 0, folder / "log", Plan(), folder, 0.2).code)
print(sorted(path.name for path in folder.iterdir() if len(path.name) == 1))
print(orphans(set(), 1.0))
run(lambda: (os.fork() or os.execvp("sleep", ["sleep", "60"])) and 0, folder / "log", Plan(), folder)
left = orphans(set(), 0.5)
print([text.split(" ", 1)[1] for text in left])
os.kill(int(left[0].split()[0]), 9)
for index in (1, 2):
    (folder / f"s{{index}}").mkdir()
    (folder / f"s{{index}}" / "config.json").write_text("{{}}" if index == 1 else "half")
(folder / "current").symlink_to("s1")
with reading(folder / "current", folder) as reader:
    time.sleep(0.5)
    (folder / "s1" / "config.json").write_text("[]")
    time.sleep(0.5)
    (folder / "next").symlink_to("s2")
    os.replace(folder / "next", folder / "current")
    time.sleep(0.5)
    seen = reader.end()
print(len(seen["states"]["s1"]), set(seen["wrong"]), seen["reads"] > 1)
os._exit(0)
"""


def test_what_watches_sees_kills_orphans_and_half_states(tmp_path):
    program = WATCH.format(benchmarks=str(ROOT / "benchmarks"), root=str(ROOT), folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines() == [
        *("7", "-9", "0", "-9", "124", "['b']", "[]"),
        "['sleep 60']",
        "2 {'s2: JSONDecodeError'} True",
    ], done.stderr[-2000:]
