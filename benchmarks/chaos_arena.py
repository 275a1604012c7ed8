"""The service that chaos is let loose on, and what must be true of it after every kill."""

import json
import os
import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from chaos_processes import Ended, Plan, orphans, run
from sqlalchemy import select
from transformers import AutoModelForCausalLM

from distributed_unlearn.cli import main
from distributed_unlearn.config.service import ServiceConfig, load_service
from distributed_unlearn.provenance import hash_ids
from distributed_unlearn.service.certificate import verify_certificate
from distributed_unlearn.service.keys import generate_key, load_public_key
from distributed_unlearn.service.ledger import Ledger, open_ledger
from distributed_unlearn.service.publication import CURRENT
from distributed_unlearn.service.requests import list_requests
from distributed_unlearn.service.rounds_book import RoundEntry, RoundState, current_round, list_rounds
from distributed_unlearn.service.states import FINAL_STATES, RequestState
from distributed_unlearn.service.tables import AUDIT, ERASED
from distributed_unlearn.service.verification import verify_ledger
from tests.tiny_job import FORGET, HOLDOUT, make_tiny_job

NUM_PEOPLE = 48
ANYTHING_GOES = {
    "forgotten": "not required",
    "earlier_forgotten": False,
    "retain_loss_nats": None,
    "retain_memorisation": None,
    "surviving_share": None,
    "drift_nats": None,
}
"""Rounds of one step on random weights forget nothing; that a gate rolls back is tested elsewhere."""


@dataclass
class Counts:
    """What was done and what was found, over a whole run."""

    kills: dict[str, int] = field(default_factory=dict)
    """By target and way."""
    restarts: int = 0
    rounds_committed: int = 0
    rounds_rolled_back: int = 0
    rounds_resumed: int = 0
    requests: int = 0
    requests_erased: int = 0
    checks: int = 0
    reads: int = 0
    slowest_end_seconds: float = 0.0
    """Of a pass of which a process of Ray was killed: until the pass had ended, and all that it had started."""
    violations: list[str] = field(default_factory=list)


class Arena:
    """One service with its model, people and ledger, in a folder of its own."""

    def __init__(self, folder: Path, counts: Counts, ledger: str | None = None, **settings: object) -> None:
        self.folder, self.counts = folder, counts
        self.known: set[int] = set()
        """Processes that may run: the reader, a database."""
        tiny = make_tiny_job(folder / "tiny", NUM_PEOPLE)
        job = yaml.safe_load(tiny.job.read_text())
        del job["forget"]
        job["solver"]["max_steps"] = 2
        job["save"] = {"state_every_steps": 1}
        job["evaluation"] = {"max_records_per_set": 6}
        job["cluster"] |= settings.pop("cluster", {})  # type: ignore[call-overload]
        (folder / "job.yaml").write_text(yaml.safe_dump(job))
        generate_key(folder / "operator.key")
        tree = {"folder": str(folder / "service"), "job": str(folder / "job.yaml"), "gates": ANYTHING_GOES}
        tree |= {"key": str(folder / "operator.key"), "ledger": ledger, "lease_seconds": 3, **settings}
        self.file = folder / "service.yaml"
        self.file.write_text(yaml.safe_dump(tree))
        self.config: ServiceConfig = load_service(self.file, [])
        self.people = [f"person-{n:04d}" for n in range(NUM_PEOPLE) if f"person-{n:04d}" not in HOLDOUT]
        assert FORGET[0] in self.people
        self._asked: dict[str, str] = {}
        self._opened: set[int] = set()
        self._ended_before: set[int] = set()

    @property
    def root(self) -> Path:
        return self.config.root

    @property
    def ledger(self) -> Ledger:
        return open_ledger(self.config.ledger_url, create=True)

    def command(self, *arguments: str, plan: Plan | None = None, limit_seconds: float = 300.0) -> Ended:
        """A command in a process of its own, which may be killed."""
        log = self.folder / "command.log"
        return run(lambda: main(list(arguments)), log, plan or Plan(), self.root, limit_seconds)

    def one_pass(self, plan: Plan | None = None, limit_seconds: float = 300.0) -> Ended:
        """`rounds run-once`."""
        return self.command("rounds", "run-once", str(self.file), plan=plan, limit_seconds=limit_seconds)

    def ask(self, plan: Plan | None = None) -> Ended:
        """The next person asks; who asks again after a kill uses the same external id."""
        person = self.people[len(self._asked)]
        arguments = (
            "request",
            "add",
            "--service",
            str(self.file),
            "--subject",
            person,
            "--external-id",
            f"of-{person}",
        )
        ended = self.command(*arguments, plan=plan)
        if ended.code == 0:
            self._asked[f"of-{person}"] = person
            self.counts.requests += 1
        elif not ended.killed:
            self.wrong(f"request add ended with {ended.code}: {ended.log[-300:]}")
        return ended

    def wrong(self, text: str) -> None:
        self.counts.violations.append(f"{self.folder.name}: {text}")
        print(f"violated: {self.counts.violations[-1]}", file=sys.stderr, flush=True)

    def killed(self, target: str, orphans_seconds: float = 5.0) -> None:
        """Count a kill, and look whether all that must hold does."""
        self.counts.kills[target] = self.counts.kills.get(target, 0) + 1
        self.check(orphans_seconds)

    def check(self, orphans_seconds: float = 5.0) -> None:
        """What must hold at any instant, whoever was killed."""
        self.counts.checks += 1
        for orphan in orphans(self.known, orphans_seconds):
            self.wrong(f"an orphan: {orphan}")
        if not self.root.exists():
            return
        ledger = self.ledger
        found = verify_ledger(ledger, self.root, [load_public_key(self.folder / "operator.pub")])
        if found.broken is not None:
            self.wrong(f"verify: {found.broken}")
        self._check_requests(ledger)
        self._check_current(ledger)

    def _check_requests(self, ledger: Ledger) -> None:
        requests = list_requests(ledger)
        by_external = Counter(request.external_id for request in requests)
        for external in self._asked:
            if by_external[external] != 1:
                self.wrong(f"a request that is there {by_external[external]} times")
        ended = {request.number for request in requests if request.state == RequestState.ERASED}
        if self._ended_before - ended:
            self.wrong(f"requests {sorted(self._ended_before - ended)}, which were erased, are not any more")
        self._ended_before = ended
        with ledger.read() as connection:
            bodies = [
                json.loads(body)
                for body in connection.execute(select(AUDIT.c.body).where(AUDIT.c.event == "request_moved")).scalars()
            ]
            rows = connection.execute(select(ERASED.c.record_hash, ERASED.c.round_id)).all()
        moves = Counter(body["request"] for body in bodies if body["to"] == RequestState.ERASED)
        if any(count != 1 for count in moves.values()) or set(moves) != ended:
            self.wrong("a request that was erased more than once")
        committed = {entry.number for entry in list_rounds(ledger) if entry.state == RoundState.COMMITTED}
        rounds_of: dict[str, set[int]] = {}
        for digest, number in rows:
            rounds_of.setdefault(digest, set()).add(number)
        if any(len(numbers) != 1 or not numbers <= committed for numbers in rounds_of.values()):
            self.wrong("a record that was erased by two rounds, or by one that was not committed")
        for request in requests:
            if request.state in FINAL_STATES and request.state != RequestState.ERASED:
                self.wrong(f"request {request.number} is {request.state}")

    def _check_current(self, ledger: Ledger) -> None:
        """`current` is a committed state: the ledger's, or its parent where the kill fell before publication."""
        entry, pointer = current_round(ledger), self.root / CURRENT
        if not pointer.is_symlink():
            if entry is not None and entry.parent is not None:
                self.wrong("`current` is gone")
            return
        shown = [e for e in list_rounds(ledger) if e.folder == os.path.dirname(os.readlink(pointer))]
        if len(shown) != 1 or entry is None or shown[0].number not in (entry.number, entry.parent):
            self.wrong(f"`current` shows {os.readlink(pointer)}, which is not the ledger's")
        elif shown[0].number not in self._opened:
            AutoModelForCausalLM.from_pretrained(pointer, local_files_only=True)
            self._opened.add(shown[0].number)

    def settle(self, limit_passes: int = 8) -> None:
        """Undisturbed passes, as a supervisor starts them, until nothing is pending; then what must hold at rest."""
        for _ in range(limit_passes):
            ended = self.one_pass()
            self.counts.restarts += 1
            if ended.code != 0:
                self.wrong(f"an undisturbed pass ended with {ended.code}: {ended.log[-600:]}")
            if all(request.state in FINAL_STATES for request in list_requests(self.ledger)):
                break
        self.check()
        ledger = self.ledger
        entry = current_round(ledger)
        pending = [request.number for request in list_requests(ledger) if request.state not in FINAL_STATES]
        if pending or entry is None:
            self.wrong(f"requests {pending} are pending after {limit_passes} undisturbed passes")
            return
        if os.readlink(self.root / CURRENT) != f"{entry.folder}/checkpoint":
            self.wrong("`current` is not the ledger's current state")
        self._check_erased(ledger, entry)
        left = [p for p in self.root.rglob(".*") if p.is_dir() or not p.name.startswith("ledger")]
        left += [path for path in Path(os.environ["TMPDIR"]).iterdir() if not _compiler_check(path)]
        if left:
            self.wrong(f"left behind: {[str(path) for path in left]}")

    def _check_erased(self, ledger: Ledger, entry: RoundEntry) -> None:
        """The published state's own papers say that everybody's records were erased, and every certificate verifies."""
        folder = self.root / str(entry.folder)
        record = json.loads((folder / "record.json").read_text())
        hashes = set().union(*record["erased_before_sha256_salted"], *record["erased_ids_sha256_salted"])
        salt = (folder / "record.salt").read_text().strip()
        rows = [json.loads(line) for line in (self.folder / "tiny" / "records.jsonl").read_text().splitlines()]
        for person in self._asked.values():
            ids = [row["record_id"] for row in rows if row["subject_id"] == person]
            if not ids or not hashes.issuperset(hash_ids(ids, salt)):
                self.wrong("a record that the published state's papers do not name as erased")
        key = load_public_key(self.folder / "operator.pub")
        for request in list_requests(ledger):
            verify_certificate(self.root / "certificates" / f"request-{request.number:06d}.json", [key])

    def tally(self, seen: dict[str, object]) -> None:
        """Add up the rounds, and what the reader saw."""
        ledger = self.ledger
        for entry in list_rounds(ledger):
            self.counts.rounds_committed += entry.state == RoundState.COMMITTED
            self.counts.rounds_rolled_back += entry.state == RoundState.ROLLED_BACK
        with ledger.read() as connection:
            events = Counter(connection.execute(select(AUDIT.c.event)).scalars())
        self.counts.rounds_resumed += events["round_resumed"]
        self.counts.requests_erased += len(self._ended_before)
        self._compare_seen(seen)

    def _compare_seen(self, seen: dict[str, object]) -> None:
        wrong, states = seen["wrong"], seen["states"]
        assert isinstance(wrong, list) and isinstance(states, dict) and isinstance(seen["reads"], int)
        self.counts.reads += seen["reads"]
        for text in wrong:
            self.wrong(f"the reader met {text}")
        files = {f"{entry.folder}/checkpoint": entry.files_sha256 for entry in list_rounds(self.ledger) if entry.folder}
        for state, versions in states.items():
            if len(versions) != 1:
                self.wrong(f"the reader saw {len(versions)} versions of {state}")
            committed = files.get(state)
            if committed is not None:
                expected = {k: v for k, v in json.loads(committed).items() if k.startswith("checkpoint/")}
                if {f"checkpoint/{k}": v for k, v in json.loads(versions[0]).items()} != expected:
                    self.wrong(f"the reader saw another {state} than was committed")


def _compiler_check(folder: Path) -> bool:
    """Whether it is where DeepSpeed tried the C compiler when its process was killed; it holds an empty program."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {"no folder"}
    return re.fullmatch(r"tmp[a-z0-9_]{8}", folder.name) is not None and names <= {
        "test.c",
        "test.o",
        "stderr.txt",
        "a.out",
    }
