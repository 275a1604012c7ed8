"""`check spectrum`: the eigenvalues of the retain Hessian and its numerical rank, of a model or along a training."""

import json

from rich.console import Console

from distributed_unlearn.cluster.open import open_group
from distributed_unlearn.commands.console_events import describe_data, print_line
from distributed_unlearn.config import JobConfig
from distributed_unlearn.errors import ConfigError
from distributed_unlearn.records import to_json
from distributed_unlearn.records.spectrum import SpectrumPoint, SpectrumRecord
from distributed_unlearn.report.tables import number
from distributed_unlearn.rounds.folder import claimed, output_folder
from distributed_unlearn.rounds.spectrum import SpectrumSettings, measure_spectra, prepare_spectrum, write_spectrum


def read_epochs(text: str) -> tuple[int, ...]:
    """`0,1,5` as numbers, ascending and each once.

    Raises:
        ConfigError: anything else.
    """
    parts = [part for part in text.split(",") if part.strip()]
    if not all(part.strip().isdecimal() for part in parts):
        raise ConfigError(f"--epochs {text}", "whole numbers from 0 with commas between", "write e.g. --epochs 0,1,5")
    return tuple(sorted({int(part) for part in parts}))


def run_spectrum(job: JobConfig, settings: SpectrumSettings, console: Console) -> SpectrumRecord:
    """Measure, write spectrum.json into the job's output folder; the last line printed is one JSON object.

    Raises:
        UserError: anything that the user can act on.
    """
    folder = output_folder(job.output)
    with claimed(folder):
        data = prepare_spectrum(job, settings)
        print_line(console, describe_data(data))
        with open_group(job.cluster) as group:
            record = measure_spectra(group, job, data, settings, lambda p, n: print_line(console, _in_words(p, n)))
            path = write_spectrum(folder, record)
    points = [
        {"epoch": point.epoch, "largest": point.eigenvalues[-1], "smallest": point.eigenvalues[0], "ranks": point.ranks}
        for point in record.points
    ]
    line = {"spectrum": str(path), "method": record.method, "dimension": record.dimension, "points": to_json(points)}
    print_line(console, json.dumps(line))
    return record


def _in_words(point: SpectrumPoint, dimension: int) -> str:
    where = "" if point.epoch is None else f"after epoch {point.epoch}: "
    ranks = ", ".join(
        f"{number(rank.rank, 3)}{'' if rank.standard_error is None else f' ± {number(rank.standard_error, 2)}'} "
        f"above {rank.cutoff:g}"
        for rank in point.ranks
    )
    return (
        f"{where}loss {point.loss_nats_per_token:.4f}, eigenvalues from {number(point.eigenvalues[0], 3)} to "
        f"{number(point.eigenvalues[-1], 3)}; of {dimension:,} {ranks} of the largest; {point.num_products} products, "
        f"{point.wall_seconds:.1f} s"
    )
