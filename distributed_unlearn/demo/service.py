"""The service in a few minutes: three requests arrive, two rounds are committed, one is rolled back, papers verify.

It trains a model on fictitious people and then does what an operator does, by the same functions as the commands.
"""

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import yaml
from rich.console import Console

from distributed_unlearn.cluster.open import open_group
from distributed_unlearn.commands.console_events import print_line
from distributed_unlearn.commands.run import run_job
from distributed_unlearn.config import ClusterConfig
from distributed_unlearn.config.service import ServiceConfig, load_service
from distributed_unlearn.demo.jobs import DemoJobs
from distributed_unlearn.demo.run import create_initial
from distributed_unlearn.demo.settings import DemoSettings
from distributed_unlearn.errors import CheckFailedError, ConfigError
from distributed_unlearn.files import write_json
from distributed_unlearn.report.progress import stage
from distributed_unlearn.rounds.folder import claimed, confirm_shared, output_folder
from distributed_unlearn.service.certificate import verify_certificate
from distributed_unlearn.service.driver import Pass, run_pass
from distributed_unlearn.service.keys import generate_key, load_public_key
from distributed_unlearn.service.ledger import open_ledger, service_ledger
from distributed_unlearn.service.opening import opened
from distributed_unlearn.service.requests import NewRequest, add_request, get_request
from distributed_unlearn.service.verification import verify_ledger
from distributed_unlearn.workers.client import Workers
from distributed_unlearn.workers.group import WorkerGroup

_WRITTEN = (
    *("records.jsonl", "initial", "original", "job.yaml", "service.yaml", "operator.key", "operator.pub", "service"),
    "summary.json",
)
MAX_STEPS = 40
"""The stopping rule ends a round long before; the short demo's own few steps forget only partly."""
HURRIED = ("solver.max_steps=1",)
"""Overrides of a pass whose round cannot have forgotten anything: its gate must say so."""


@dataclass(frozen=True, eq=False)
class _Office:
    """An operator at work: a service file, open workers, a console."""

    path: Path
    group: WorkerGroup
    console: Console

    @property
    def config(self) -> ServiceConfig:
        """The service file."""
        return load_service(self.path, [])

    def say(self, text: str) -> None:
        """A line of the story."""
        print_line(self.console, text)

    def receive(self, subject: str, external_id: str) -> int:
        """A request arrives; its number."""
        asked = NewRequest(subjects=(subject,), external_id=external_id)
        request = add_request(service_ledger(self.config), asked, self.config.requests)
        self.say(f"request {request.number} ({external_id}) arrives; due {request.due_at:%Y-%m-%d}")
        return request.number

    def run(self, overrides: tuple[str, ...] = ()) -> Pass:
        """One pass, as `rounds run-once` makes it, on the open workers; says how it ended."""
        config = self.config.model_copy(update={"overrides": overrides})
        with stage(self.console, "a round is running"), opened(config) as service:
            found = run_pass(service, lambda job: run_job(job, group=self.group).record)
        assert found.round is not None, "there was a request"
        number = found.round.number
        if found.failed_gates:
            self.say(f"round {number} is rolled back: {'; '.join(found.failed_gates)}")
        else:
            papers = ", ".join(map(str, found.certificates))
            self.say(f"round {number} is committed and published; certificates for requests {papers}")
        return found

    def state(self, number: int) -> str:
        """Where a request stands."""
        return get_request(open_ledger(self.config.ledger_url), number).state.value


def run_service_demo(
    settings: DemoSettings, cluster: ClusterConfig, folder: Path, overwrite: bool, console: Console
) -> bool:
    """Run the demo and write its service, certificates and summary.json into `folder`.

    Returns:
        Whether it went as it is told: two rounds committed, the hurried one rolled back.

    Raises:
        ConfigError: the folder holds something that the demo would replace and `overwrite` is false.
        CheckFailedError: ledger or certificates do not verify, or a forged one does.
    """
    folder = output_folder(str(folder))
    with claimed(folder):
        _make_room(folder, overwrite)
        started = time.monotonic()
        with open_group(cluster) as group:
            workers = Workers(group)
            confirm_shared(workers, folder)
            create_initial(settings, workers, folder)
            jobs = DemoJobs(settings, cluster, folder)
            people = settings.num_subjects - settings.num_holdout_subjects
            with stage(console, f"training a model on {people} fictitious people"):
                run_job(jobs.training("original", exclude_forget=False), group=group)
            passes, states = _work(_Office(_write_files(jobs, folder), group, console))
        verified = _verify(folder, len(states), console)
        told = [len(found.failed_gates) > 0 for found in passes] == [False, True, False]
        summary = {
            "rounds": [None if found.round is None else found.round.number for found in passes],
            "committed": [not found.failed_gates for found in passes],
            "failed_gates": [list(found.failed_gates) for found in passes],
            "requests": states,
            **verified,
            "as_told": told,
            "wall_seconds": round(time.monotonic() - started, 1),
        }
        write_json(folder / "summary.json", summary)
    print_line(console, json.dumps(summary))
    return told


def _make_room(folder: Path, overwrite: bool) -> None:
    taken = [name for name in _WRITTEN if (folder / name).exists()]
    if taken and not overwrite:
        raise ConfigError(
            f"'{folder}' with an earlier demo or other files ({', '.join(taken)})",
            "a folder without them",
            "give --overwrite or another --output",
        )
    for name in taken:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _write_files(jobs: DemoJobs, folder: Path) -> Path:
    """The job and service file, and the operator's key, as an operator writes them; returns the service file."""
    job = jobs.unlearning("-")
    solver = job.solver.model_copy(update={"max_steps": MAX_STEPS})
    job = job.model_copy(
        update={"forget": None, "retrained": None, "output": "-", "overwrite": False, "solver": solver}
    )
    (folder / "job.yaml").write_text(yaml.safe_dump(job.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
    generate_key(folder / "operator.key")
    service = {"folder": "service", "job": "job.yaml", "key": "operator.key"}
    tree = {key: str((folder / name).resolve()) for key, name in service.items()}
    (folder / "service.yaml").write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    return folder / "service.yaml"


def _work(office: _Office) -> tuple[list[Pass], dict[str, str]]:
    """Three requests, three passes: committed, rolled back, committed."""
    people = [f"person-{number:04d}" for number in range(3)]
    numbers = [office.receive(people[0], "case-1"), office.receive(people[1], "case-2")]
    passes = [office.run()]
    before = (office.config.root / "current").resolve()
    numbers.append(office.receive(people[2], "case-3"))
    office.say(f"a hurried pass ({', '.join(HURRIED)}):")
    passes.append(office.run(HURRIED))
    same = (office.config.root / "current").resolve() == before
    published = "the same" if same else "ANOTHER"
    office.say(f"  the published model is {published}; request {numbers[-1]} is {office.state(numbers[-1])}")
    office.say("the next pass, as the job file has it:")
    passes.append(office.run())
    return passes, {f"request {number}": office.state(number) for number in numbers}


def _verify(folder: Path, num_requests: int, console: Console) -> dict[str, int]:
    """Verify ledger and certificates with the public key alone, and that a forged certificate is found out."""
    key, root = load_public_key(folder / "operator.pub"), folder / "service"
    found = verify_ledger(open_ledger(str(root / "ledger.db")), root, [key])
    if found.broken is not None:
        raise CheckFailedError(found.broken, "a ledger that verifies", "this is a bug: please report it")
    papers = sorted((root / "certificates").glob("request-*.json"))
    for path in papers:
        predicate = verify_certificate(path, [key])["predicate"]
        print_line(console, f"{path.name} verifies: {_words(predicate)}")
    print_line(
        console,
        f"the ledger verifies: {found.num_entries} entries, signed up to {found.last_signed}, {found.num_files} files; "
        f"{len(papers)} of {num_requests} requests have a certificate",
    )
    return {"num_certificates": len(papers), "num_audit_entries": found.num_entries, "num_files": found.num_files}


def _words(predicate: dict[str, object]) -> str:
    """The outcome, and how exposed the records still are."""
    answer, erasure = predicate["answer"], predicate["round"]
    assert isinstance(answer, dict)
    text = f"{answer['outcome']}"
    if isinstance(erasure, dict) and erasure.get("exposure"):
        exposure = erasure["exposure"]
        strength, unseen, area = (
            exposure[name] for name in ("extraction_strength", "extraction_strength_holdout", "membership_auc")
        )
        text += f" in round {erasure['number']}; extraction strength {strength['value']:.2f}"
        text += f" (of unseen people {unseen['value']:.2f})" if unseen else ""
        text += f", membership inference {area['value']:.2f}, {area['low']:.2f} to {area['high']:.2f}" if area else ""
    return text
