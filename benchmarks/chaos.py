"""Chaos, measured: kills of everything that can be killed, malformed inputs, and what must hold after each.

    python benchmarks/chaos.py --short          # a few minutes, for CI: drivers, requests, some of the inputs
    python benchmarks/chaos.py                  # all of it; counts and outcomes into benchmarks/results/chaos.json
    python benchmarks/chaos.py --only ray       # one part of it; the others in that file stay as they are

Small rounds on a tiny model; a process that was killed is started again as a supervisor would. After every kill: the
ledger verifies with every state and certificate, no request is lost or erased twice, `current` is a committed state
that opens, no process is left. All the time a reader opens what `current` names. At rest: nothing is pending, the
published state's papers name everybody's records, certificates verify, no temporary file is left. Every malformed
input ends in one clear error, and the ledger says afterwards what it said before.

Linux; as root it also mounts small file systems. The last line of the output is one JSON object; the exit code is 1 if
anything was violated.
"""

import argparse
import gc
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import torch  # noqa: E402
from chaos_arena import Arena, Counts  # noqa: E402
from chaos_damage import certificates, checkpoints, ledgers  # noqa: E402
from chaos_inputs import Outcomes, http, ids, job_files, service_files  # noqa: E402
from chaos_kills import askers, fault_points, file_writes, random_instants  # noqa: E402
from chaos_machine import clocks, full_disk, read_only, two_writers  # noqa: E402
from chaos_processes import adopt_orphans  # noqa: E402
from chaos_servers import databases, ray, schedulers  # noqa: E402

from distributed_unlearn.provenance import package_versions  # noqa: E402

RESULT = Path(__file__).parent / "results" / "chaos.json"
RAY_KILLS = {"worker": 4, "raylet": 2, "head (GCS)": 2, "driver with Ray": 2}
KILLS = ("askers", "fault_points", "file_writes", "random", "databases", "schedulers", "ray")
INPUTS = ("written", "ledgers", "certificates", "checkpoints", "two_writers", "clocks", "read_only", "full_disk")
SHORT = ("askers", "fault_points", "file_writes", "random", "written", "ledgers", "certificates", "read_only")


def _preload() -> None:
    """What every pass imports, once: a forked pass then takes seconds."""
    import deepspeed  # noqa: F401

    import distributed_unlearn.cluster.in_process
    import distributed_unlearn.commands.request
    import distributed_unlearn.commands.rounds
    import distributed_unlearn.commands.verify  # noqa: F401
    from distributed_unlearn.report import figures

    figures.svg_text = lambda figure: "<svg/>"  # half of a tiny pass; it writes nothing by itself
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()


def _kill(name: str, folder: Path, counts: Counts, seed: int, short: bool) -> str | None:
    """One campaign; says why it could not be had."""
    if name == "askers":
        askers(folder, counts, 3 if short else 60)
    elif name == "fault_points":
        fault_points(folder, counts, 12 if short else 1, 200)
    elif name == "file_writes":
        file_writes(folder, counts, 24 if short else 1, 300)
    elif name == "random":
        random_instants(folder, counts, seed, 3 if short else 40, 6.0)
    elif name == "databases":
        return databases(folder, counts, seed, 15, 4.0)
    elif name == "schedulers":
        schedulers(folder, counts, seed, 8)
    else:
        ray(folder, counts, seed, RAY_KILLS)
    return None


def _input(name: str, arena: Arena, outcomes: Outcomes, seed: int, short: bool) -> None:
    share = 4 if short else 1
    if name == "written":
        job_files(outcomes, arena, 60 // share, seed)
        service_files(outcomes, arena, 50 // share, seed)
        ids(outcomes, arena)
        http(outcomes, arena)
    elif name == "ledgers":
        ledgers(outcomes, arena, seed)
    elif name == "certificates":
        certificates(outcomes, arena, seed, 20 // share)
    elif name == "checkpoints":
        checkpoints(outcomes, arena, seed, 12)
    elif name == "two_writers":
        two_writers(outcomes, arena, 4)
    elif name == "clocks":
        clocks(outcomes, arena, seed)
    elif name == "read_only":
        read_only(outcomes, arena)
    else:
        full_disk(outcomes, arena)


def _two_rounds(folder: Path, counts: Counts) -> Arena:
    """A service with two committed rounds, on which inputs are tried."""
    arena = Arena(folder, counts)
    for _ in range(2):
        arena.ask()
        arena.settle()
    return arena


def run_part(name: str, folder: Path, seed: int, short: bool) -> dict[str, Any]:
    """One part; its counts and outcomes."""
    begun, counts, outcomes, skipped = time.monotonic(), Counts(), Outcomes(), None
    if name in KILLS:
        skipped = _kill(name, folder, counts, seed, short)
    else:
        _input(name, _two_rounds(folder, counts), outcomes, seed, short)
    violations = [*counts.violations, *outcomes.violations]
    found = asdict(counts) if name in KILLS else asdict(outcomes)
    found |= {"violations": violations, "skipped": skipped, "seed": seed, "date": datetime.now(UTC).date().isoformat()}
    found["seconds"] = round(time.monotonic() - begun, 1)
    print(f"{name}: {found['seconds']:.0f} s, {len(violations)} violations", file=sys.stderr, flush=True)
    return found


def summary(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Totals over parts."""
    kills: dict[str, int] = {}
    for part in parts.values():
        for target, number in part.get("kills", {}).items():
            kills[target] = kills.get(target, 0) + number
    refused = sum(sum(part.get("refused", {}).values()) for part in parts.values())
    accepted = sum(sum(part.get("accepted", {}).values()) for part in parts.values())
    numbers = ("restarts", "rounds_committed", "rounds_rolled_back", "rounds_resumed", "requests", "requests_erased")
    return {
        "kills": sum(kills.values()),
        "kills_by_target": kills,
        **{name: sum(part.get(name, 0) for part in parts.values()) for name in (*numbers, "checks", "reads")},
        "malformed_inputs_refused": refused,
        "inputs_that_were_valid_after_all": accepted,
        "violations": sum(len(part["violations"]) for part in parts.values()),
        "skipped": sorted(name for name, part in parts.items() if part["skipped"]),
        "seconds": round(sum(part["seconds"] for part in parts.values()), 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="for CI; writes no file of results")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None, help="kept afterwards; default: a temporary one")
    parser.add_argument("--only", nargs="+", choices=(*KILLS, *INPUTS), default=None, metavar="PART")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="chaos-")) if arguments.folder is None else arguments.folder.absolute()
    scratch = folder / "tmp"
    scratch.mkdir(parents=True)
    os.environ["TMPDIR"] = tempfile.tempdir = str(scratch)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "torch")  # else torch makes one where we look for leftovers
    adopt_orphans()
    _preload()
    machine = {"processors": os.cpu_count(), "machine": platform.platform(), "versions": package_versions()}
    parts: dict[str, Any] = {}
    for name in arguments.only or (SHORT if arguments.short else (*KILLS, *INPUTS)):
        parts[name] = run_part(name, folder / name, arguments.seed, arguments.short)
        if not arguments.short:
            kept = json.loads(RESULT.read_text())["parts"] if RESULT.exists() else {}
            together = {**kept, name: parts[name]}
            RESULT.parent.mkdir(exist_ok=True)
            tree = {"summary": summary(together), "parts": together, **machine}
            RESULT.write_text(json.dumps(tree, indent=2, sort_keys=True) + "\n")
    if arguments.folder is None:
        shutil.rmtree(folder, ignore_errors=True)
    found = summary(parts)
    print(json.dumps(found, sort_keys=True))
    return 1 if found["violations"] else 0


if __name__ == "__main__":
    sys.exit(main())
