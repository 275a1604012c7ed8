"""A round without a model: writes what a round leaves in its folder, with scores that a test sets."""

from dataclasses import replace
from pathlib import Path

import yaml

from distributed_unlearn.config import JobConfig
from distributed_unlearn.config.service import load_service
from distributed_unlearn.files import complete_folder, write_json
from distributed_unlearn.provenance import hash_folder
from distributed_unlearn.records import (
    BaseCheckpoint,
    ResultFiles,
    RoundRecord,
    RunRecord,
    SetScores,
    SurvivingUpdate,
    Verdict,
    to_json,
)
from distributed_unlearn.records.verdict import ForgetVerdict, MeasureEvidence, RetainVerdict
from distributed_unlearn.rounds.state import STATE_FOLDER
from distributed_unlearn.service.driver import Service, run_pass
from distributed_unlearn.service.keys import generate_key
from distributed_unlearn.service.ledger import Ledger, open_ledger
from distributed_unlearn.service.opening import opened
from distributed_unlearn.service.requests import NewRequest, add_request

SCORES = SetScores(3, 30, 1.0, 0.5)


def _forget(name: str, outcome: str) -> ForgetVerdict:
    evidence = MeasureEvidence(3.0, 3.0, 1.0, 1.0, 0.5, 0.5, 0, 1.0)
    return ForgetVerdict(name, outcome, 3, 3, False, evidence, evidence)


def make_record(**changes: object) -> RunRecord:
    """A record that passes every gate; `changes` are those of its one round, `projection` that of its files."""
    projection = changes.pop("projection", 1.0)
    sets = {"forget": SCORES, "retain": SCORES, "holdout": SCORES}
    last = RoundRecord(
        round_index=0,
        num_forget_records=3,
        num_retain_records=9,
        holdout_loss_nats_per_token=3.0,
        stop_reason="max_steps: all 2 steps were taken",
        num_steps=2,
        num_products=4,
        update_norm=0.5,
        wall_seconds=1.0,
        steps=(),
        before=sets,
        after=sets,
        verdict=Verdict(_forget("forget", "forgotten"), RetainVerdict("kept", 9, 0.0, 0.0)),
    )
    return RunRecord(
        kind="unlearning",
        started_at="2026-03-01T12:00:00+00:00",
        config={"solver": {"method": "scurenewton"}, "objective": {"name": "holdout_matched"}},
        versions={},
        base=BaseCheckpoint("model", None, {"model.safetensors": "0" * 64}),
        result=ResultFiles("id", {}),
        num_retain_records=9,
        num_erased_before=0,
        num_erased_before_not_in_data=0,
        parent=None,
        salt_sha256=None,
        erased_before_sha256_salted=(),
        erased_ids_sha256_salted=(),
        rounds=(replace(last, **changes),),
        surviving_update=SurvivingUpdate(0.5, 0.5, projection, 1.0, "float32"),
    )


def rising(retain_loss: float) -> RunRecord:
    """A record whose retain loss rose from 1 to `retain_loss`."""
    after = replace(SCORES, loss_nats_per_token=retain_loss)
    return make_record(after={"forget": SCORES, "retain": after, "holdout": SCORES})


def not_forgotten(outcome: str = "not forgotten", earlier: str | None = None) -> RunRecord:
    sets = () if earlier is None else (_forget("erased_before_1", earlier),)
    return make_record(verdict=Verdict(_forget("forget", outcome), RetainVerdict("kept", 9, 0.0, 0.0), sets))


def interrupted_after_a_state(job: JobConfig) -> RunRecord:
    """A round that saves its state and is then told to end."""
    (Path(job.output) / STATE_FOLDER / "round_0_step_1").mkdir(parents=True, exist_ok=True)
    raise SystemExit(143)


class FakeRounds:
    """Stands in for the workers; notes the jobs that it was given."""

    def __init__(self, record: RunRecord | None = None) -> None:
        self.record = record or make_record()
        self.jobs: list[JobConfig] = []

    def __call__(self, job: JobConfig) -> RunRecord:
        self.jobs.append(job)
        folder = Path(job.output)
        with complete_folder(folder / "checkpoint", overwrite=False) as staging:
            # What it holds depends on where it started and what it erased: mixtures would show.
            content = f"{Path(job.model.path).resolve()} without {','.join(job.forget.record_ids)}"
            (staging / "model.safetensors").write_text(content)
            (staging / "config.json").write_text("{}")
            files = hash_folder(staging)
        record = replace(self.record, result=ResultFiles("id", files))
        write_json(folder / "record.json", to_json(record))
        return record


def make_service(folder: Path, num_records: int = 12, **settings: object) -> Path:
    """A service file with its key, a job and records of three each for subjects p0, p1, ...; the last is held out."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        f'{{"record_id": "r{n}", "subject_id": "p{n // 3}", "question": "q", "answer": "secret answer {n}"}}'
        for n in range(num_records)
    ]
    (folder / "records.jsonl").write_text("\n".join(rows) + "\n")
    job = {
        "model": {"path": str(folder / "model")},
        "data": {"path": str(folder / "records.jsonl")},
        "holdout": {"subjects": [f"p{num_records // 3 - 1}"]},
        "cluster": {"backend": "in_process", "num_workers": 1, "use_gpu": "never"},
        "output": "-",
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(job))
    if not (folder / "operator.key").exists():
        generate_key(folder / "operator.key")
    service = {"folder": str(folder / "service"), "job": str(folder / "job.yaml"), "key": str(folder / "operator.key")}
    (folder / "service.yaml").write_text(yaml.safe_dump({**service, **settings}))
    return folder / "service.yaml"


def ledger_of(path: Path) -> Ledger:
    """The ledger of a service file, made where there is none."""
    return open_ledger(load_service(path, []).ledger_url, create=True)


def ask_beside(path: Path, **asked: object) -> int:
    """The number of a request that comes from another process, by the service file alone."""
    config = load_service(path, [])
    config.root.mkdir(exist_ok=True)
    return add_request(ledger_of(path), NewRequest(**asked), config.requests).number


def ask(service: Service, **asked: object) -> int:
    return add_request(service.ledger, NewRequest(**asked), service.config.requests).number


def one_pass(path: Path, execute: FakeRounds):
    """A pass as a process of its own would make it."""
    with opened(load_service(path, [])) as service:
        return run_pass(service, execute)
