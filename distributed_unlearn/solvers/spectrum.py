"""The eigenvalues of a step's curvature matrix: all of them where it can be written down, else their distribution.

Stochastic Lanczos quadrature (Ubaru, Chen, Saad 2017; for networks Ghorbani, Krishnan, Xiao 2019): the eigenvalues
`theta_k` of the tridiagonal `T = Q'HQ` of a Lanczos basis from a random start, weighted by the squares `tau_k` of the
first entries of T's eigenvectors, integrate every polynomial of degree below 2m over the spectrum as the start vector
sees it. The mean over starts is the share of the n eigenvalues near each value.
"""

import math
import statistics
from dataclasses import dataclass

import torch

from distributed_unlearn.errors import NumericalError
from distributed_unlearn.solvers.inner.explicit import ExplicitSpec, ExplicitSpectrum
from distributed_unlearn.solvers.inner.quadrature import QuadratureSpec
from distributed_unlearn.solvers.protocols import StepOracle, StepSpec


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues with the share of all n of them that each stands for; shares add up to one."""

    loss: float
    """Of the records on which the matrix was measured."""
    eigenvalues: tuple[float, ...]
    """Ascending."""
    shares: tuple[float, ...]
    probe: tuple[int, ...]
    """Which start vector each came from; all zero where they are exact."""
    num_probes: int
    """0: exact."""
    num_products: int


@dataclass(frozen=True)
class Rank:
    """How many eigenvalues are above a share of the largest, in size."""

    value: float
    standard_error: float | None
    """Over the start vectors; None where it is exact, or of a single one."""


def exact_spectrum(oracle: StepOracle, max_parameters: int) -> Spectrum:
    """All n eigenvalues, from n products with unit vectors and a decomposition in float64 on rank 0.

    Raises:
        ConfigError: more trainable parameters than `max_parameters`.
        NumericalError: a product that is not finite.
    """
    start = oracle.begin_step(0, StepSpec(ExplicitSpec(max_parameters)))
    spectrum = ExplicitSpectrum(oracle)
    eigenvalues, _ = spectrum.get()
    _refuse_non_finite(bool(torch.isfinite(eigenvalues).all()))
    values = tuple(eigenvalues.tolist())
    return Spectrum(
        start.loss, values, (1.0 / len(values),) * len(values), (0,) * len(values), 0, spectrum.num_products
    )


def lanczos_spectrum(oracle: StepOracle, num_probes: int, num_steps: int) -> Spectrum:
    """The distribution of the eigenvalues from `num_probes` start vectors of at most `num_steps` products each.

    The ends of the spectrum are found to high accuracy, its inside as a density. Every rank keeps `num_steps + 1`
    vectors of its share of the parameters.

    Raises:
        NumericalError: a product that is not finite.
    """
    start = oracle.begin_step(0, StepSpec(QuadratureSpec()))
    found: list[tuple[float, float, int]] = []
    num_products = 0
    for probe in range(num_probes):
        diagonal: list[float] = []
        off_diagonal: list[float] = []
        while len(diagonal) < num_steps and not (off_diagonal and off_diagonal[-1] == 0.0):
            entry = oracle.advance(*(() if diagonal else (float(probe),)))
            _refuse_non_finite(all(math.isfinite(value) for value in entry))
            diagonal.append(entry[0])
            off_diagonal.append(entry[1])
        num_products += len(diagonal)
        nodes, weights = quadrature(diagonal, off_diagonal[:-1])
        found += [(node, weight / num_probes, probe) for node, weight in zip(nodes, weights, strict=True)]
    found.sort()
    nodes_, shares, probes = zip(*found, strict=True)
    return Spectrum(start.loss, nodes_, shares, probes, num_probes, num_products)


def quadrature(diagonal: list[float], off_diagonal: list[float]) -> tuple[list[float], list[float]]:
    """Eigenvalues of a symmetric tridiagonal matrix and the squared first entries of its eigenvectors, in float64."""
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    if off_diagonal:
        beside = torch.tensor(off_diagonal, dtype=torch.float64)
        matrix += torch.diag(beside, 1) + torch.diag(beside, -1)
    nodes, vectors = torch.linalg.eigh(matrix)
    return nodes.tolist(), (vectors[0] ** 2).tolist()


def numerical_rank(spectrum: Spectrum, dimension: int, cutoff: float) -> Rank:
    """`#{i: |lambda_i| > cutoff max_j |lambda_j|}`, of `dimension` eigenvalues.

    Args:
        spectrum: Where it is a distribution the rank is an estimate: `dimension` times the share above the cutoff.
        dimension: n.
        cutoff: Share of the largest eigenvalue in size, at least 0 and below 1.
    """
    above = cutoff * max(map(abs, spectrum.eigenvalues))
    by_probe = [0.0] * max(spectrum.num_probes, 1)
    for value, share, probe in zip(spectrum.eigenvalues, spectrum.shares, spectrum.probe, strict=True):
        if abs(value) > above:
            by_probe[probe] += share
    if spectrum.num_probes == 0:
        return Rank(float(round(by_probe[0] * dimension)), None)
    estimates = [dimension * spectrum.num_probes * share for share in by_probe]
    error = statistics.stdev(estimates) / math.sqrt(len(estimates)) if len(estimates) > 1 else None
    return Rank(statistics.fmean(estimates), error)


def _refuse_non_finite(is_finite: bool) -> None:
    if not is_finite:
        raise NumericalError(
            "a curvature product that is not finite", "finite products", "use float32, or check the checkpoint"
        )
