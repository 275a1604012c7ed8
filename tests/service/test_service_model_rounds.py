"""Rounds of the service on a real, tiny model: the command line, the chain of states, and a driver that is killed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from distributed_unlearn.records import read_record
from distributed_unlearn.service.ledger import open_ledger
from distributed_unlearn.service.requests import list_requests
from distributed_unlearn.service.rounds_book import RoundState, list_rounds
from tests.cli.command_line import assert_refused, call, succeed

LENIENT = {
    "forgotten": "not required",
    "earlier_forgotten": False,
    "retain_loss_nats": 50.0,
    "retain_memorisation": None,
}


DAMAGING = json.dumps(
    [
        "objective={name: gradient_ascent}",
        "solver={method: adamw, learning_rate: 0.05, max_steps: 2, gradient_batch: 6, "
        "stop: {forget_matches_holdout: false}}",
    ]
)


def _service(folder: Path, tiny, **settings: object) -> Path:
    job = yaml.safe_load(tiny.job.read_text())
    del job["forget"]
    job["save"] = {"state_every_steps": 1}
    (folder / "job.yaml").write_text(yaml.safe_dump(job))
    tree = {"folder": str(folder / "service"), "job": str(folder / "job.yaml"), "key": str(folder / "operator.key")}
    path = folder / "service.yaml"
    path.write_text(yaml.safe_dump({**tree, "gates": LENIENT, "lease_seconds": 5, **settings}))
    return path


def _last_json(outcome):
    return json.loads(outcome.out.strip().splitlines()[-1])


@pytest.mark.slow
def test_two_rounds_a_failed_gate_and_their_papers(capsys, tiny, tmp_path):
    path, root = _service(tmp_path, tiny), tmp_path / "service"
    succeed(capsys, ["key", "generate", str(tmp_path / "operator.key")])
    add = ["request", "add", "--service", str(path)]
    succeed(capsys, [*add, "--subject", "person-0000"])
    assert _last_json(succeed(capsys, ["rounds", "run-once", str(path)]))["committed"]
    succeed(capsys, [*add, "--subject", "person-0001"])
    refused = call(capsys, ["rounds", "run-once", str(path), "gates.retain_loss_nats=0.1", f"overrides={DAMAGING}"])
    assert_refused(refused, 14, "gate", "round 2", "the retain loss rose by", "0.1 at most")
    assert os.readlink(root / "current") == "states/round-0001/checkpoint"
    assert _last_json(succeed(capsys, ["rounds", "run-once", str(path)]))["round"] == 3
    record = read_record(root / "states" / "round-0003" / "record.json")
    assert record.num_erased_before == 3 and record.rounds[0].num_forget_records == 3
    assert record.rounds[0].num_retain_records == 6, "of 18: six held out, three erased before, three now"
    first = load_file(root / "states" / "round-0001" / "checkpoint" / "model.safetensors")
    origin = read_record(root / "states" / "round-0001" / "record.json")
    assert record.base.files["model.safetensors"] == origin.result.files["model.safetensors"], "it goes on from round 1"
    assert AutoModelForCausalLM.from_pretrained(root / "current").dtype == next(iter(first.values())).dtype
    public = str(tmp_path / "operator.pub")
    assert "verifies" in succeed(capsys, ["verify", "--ledger", str(root / "ledger.db"), "--key", public]).out
    certificate = root / "certificates" / "request-000002.json"
    arguments = ["verify", "--certificate", str(certificate), "--key", public, "--json"]
    predicate = json.loads(succeed(capsys, arguments).out)["predicate"]
    assert predicate["round"]["number"] == 3 and predicate["round"]["update_norm"] > 0
    assert predicate["round"]["alpha"]["last"] > 0 and predicate["round"]["verdict"] is not None
    assert predicate["round"]["weights_before"] == record.base.files
    answers = [row["answer"] for row in tiny.rows()]
    for file in root.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            assert not any(answer.encode() in content for answer in answers), file


RUN = "import sys; from distributed_unlearn.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.mark.slow
def test_a_driver_that_is_killed_again_and_again_ends_with_every_request_erased_once(capsys, tiny, tmp_path):
    path, root = _service(tmp_path, tiny), tmp_path / "service"
    succeed(capsys, ["key", "generate", str(tmp_path / "operator.key")])
    for person in ("person-0000", "person-0001"):
        succeed(capsys, ["request", "add", "--service", str(path), "--subject", person])
    chance, command = random.Random(0), [sys.executable, "-c", RUN, "rounds", "run-once", str(path)]
    for _ in range(3):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 300
        while not list_rounds(open_ledger(str(root / "ledger.db"))) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.2)  # until the first round has begun
        time.sleep(chance.uniform(0.0, 8.0))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert "verifies" in succeed(capsys, ["verify", "--ledger", str(root / "ledger.db")]).out
    assert subprocess.run(command, timeout=600, capture_output=True).returncode == 0
    ledger = open_ledger(str(root / "ledger.db"))
    assert [request.state.value for request in list_requests(ledger)] == ["erased", "erased"]
    committed = [entry for entry in list_rounds(ledger) if entry.state == RoundState.COMMITTED]
    assert len(committed) == 1 and [p.name for p in (root / "states").iterdir()] == [committed[0].folder[7:]]
    assert "verifies" in succeed(capsys, ["verify", "--ledger", str(root / "ledger.db")]).out
