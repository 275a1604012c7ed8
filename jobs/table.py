"""Print what unlearning runs came to, as a Markdown table drawn from their records.

    python jobs/table.py runs/digits/cnn_*_class        # output folders; those without rounds are passed over

Each set: loss in nats per token (a classifier's: per record) / share memorised (a classifier's: accuracy). First row:
the checkpoint that the first run started from; last row: its retrained reference. Products, norm and seconds are those
of a run's last round.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

from distributed_unlearn import load_record
from distributed_unlearn.records import RunRecord, SetScores

SETS = ("forget", "retain", "holdout")


def cells(scores: Mapping[str, SetScores]) -> list[str]:
    """Loss and memorisation on every set."""
    found = (scores[name] for name in SETS)
    return [f"{score.loss_nats_per_token:.3f} / {score.exact_memorisation:.3f}" for score in found]


def row(*columns: str) -> str:
    return f"| {' | '.join(columns)} |"


def table(runs: Mapping[str, RunRecord]) -> list[str]:
    """The lines of the table."""
    first = next(iter(runs.values()))
    lines = [
        row("", "steps, products", *SETS, "Tug-of-War", "norm of update", "seconds", "verdict"),
        row(*["---"] * 9),
        row("original", "", *cells(first.rounds[0].before), "", "", "", ""),
    ]
    for name, run in runs.items():
        last = run.rounds[-1]
        closeness = "" if last.tug_of_war is None else f"{last.tug_of_war:.3f}"
        forgotten = "not measured" if last.verdict.forget is None else last.verdict.forget.outcome
        counts, verdict = f"{last.num_steps}, {last.num_products}", f"{forgotten}, {last.verdict.retain.outcome}"
        tail = (closeness, f"{last.update_norm:.3g}", f"{last.wall_seconds:.1f}", verdict)
        lines.append(row(name, counts, *cells(last.after), *tail))
    if first.retrained is not None:
        lines.append(row("retrained", "", *cells(first.retrained), "1", "", "", ""))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description="Print a table of unlearning runs.")
    parser.add_argument("folders", type=Path, nargs="+", help="output folders of runs")
    found = {folder.name: load_record(folder) for folder in parser.parse_args().folders}
    runs = {name: record for name, record in found.items() if record.rounds}
    if not runs:
        raise SystemExit("none of these folders holds the record of an unlearning run")
    print("\n".join(table(runs)))


if __name__ == "__main__":
    main()
