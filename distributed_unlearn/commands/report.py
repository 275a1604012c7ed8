"""`report`: figures of runs, comparisons and spectra on one page that stands by itself, each figure also as data."""

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from distributed_unlearn.commands.console_events import print_line
from distributed_unlearn.files import expand_home
from distributed_unlearn.rounds.folder import output_folder
from distributed_unlearn.rounds.overview import write_overview


def run_report(folders: Sequence[str], output: str | None, overwrite: bool, console: Console) -> Path:
    """Draw and print where it is; without `output` the page is in `report` in the first folder.

    Raises:
        ConfigError, DataError: see `write_overview`.
    """
    chosen = [Path(expand_home(folder)) for folder in folders]
    destination = chosen[0] / "report" if output is None else output_folder(output)
    # What a report of these folders wrote before is its own to replace; another folder is the user's.
    page = write_overview(chosen, destination, overwrite or output is None)
    pictures = sorted(path.stem for path in (destination / "pictures").glob("*.svg"))
    print_line(console, f"report: {page}")
    print_line(console, json.dumps({"report": str(page), "data": str(destination / "data"), "pictures": pictures}))
    return page
