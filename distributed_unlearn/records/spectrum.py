"""The spectrum of the retain Hessian at one or several points of a training, as `spectrum.json` holds it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from distributed_unlearn.records.codec import read_formatted

SPECTRUM_NAME = "spectrum.json"
SPECTRUM_FORMAT = 1


@dataclass(frozen=True)
class NumericalRank:
    """Eigenvalues that are larger, in size, than a share of the largest one."""

    cutoff: float
    rank: float
    """A count where the spectrum is exact, else an estimate."""
    standard_error: float | None
    """Of the estimate, over the start vectors."""


@dataclass(frozen=True)
class SpectrumPoint:
    """One model."""

    epoch: int | None
    """Passes over the training records before; None of a checkpoint as it was given."""
    loss_nats_per_token: float
    """On the records of the Hessian."""
    eigenvalues: tuple[float, ...]
    """All of them, ascending; of stochastic Lanczos quadrature its nodes."""
    shares: tuple[float, ...]
    """The share of all eigenvalues that each stands for; together one."""
    num_products: int
    ranks: tuple[NumericalRank, ...]
    wall_seconds: float


@dataclass(frozen=True)
class SpectrumRecord:
    """A measurement of spectra."""

    format: int
    method: Literal["exact", "lanczos"]
    product: Literal["hessian", "gauss_newton"]
    dimension: int
    """Trainable parameters."""
    num_records: int
    """Retained records over which the loss is a mean."""
    num_probes: int
    """Start vectors; 0 where all eigenvalues were computed."""
    config: dict[str, object]
    """The job, resolved."""
    versions: dict[str, str | None]
    points: tuple[SpectrumPoint, ...]


def read_spectrum(folder: Path) -> SpectrumRecord:
    """The spectra in a folder.

    Raises:
        DataError: none there, or of another format.
    """
    path, missing = folder / SPECTRUM_NAME, "give the output folder of `check spectrum`"
    return read_formatted(SpectrumRecord, path, "spectrum", SPECTRUM_FORMAT, missing, {None: "measure it again"})
