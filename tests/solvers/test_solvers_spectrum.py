"""Spectra against dense eigen-decompositions in float64: exact ones, stochastic Lanczos quadrature, numerical rank."""

import math

import pytest
import torch
from memory_oracle import MemoryOracle

from distributed_unlearn.errors import ConfigError, NumericalError
from distributed_unlearn.solvers.spectrum import exact_spectrum, lanczos_spectrum, numerical_rank, quadrature


def matrix(eigenvalues: list[float], seed: int = 0) -> torch.Tensor:
    """A symmetric matrix with these eigenvalues."""
    n = len(eigenvalues)
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    return q @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ q.T


def oracle_of(h: torch.Tensor) -> MemoryOracle:
    slope = torch.linspace(1.0, 2.0, len(h), dtype=torch.float64)
    return MemoryOracle(lambda w, step: 0.5 * w @ h @ w + slope @ w + 3.0, torch.zeros(len(h), dtype=torch.float64))


DEGENERATE = [*[0.0] * 60, *[1e-5] * 20, -0.5, 0.3, 1.0, 4.0, 100.0]


def test_exact_spectrum_is_that_of_the_dense_matrix():
    h = matrix(DEGENERATE)
    oracle = oracle_of(h)
    found = exact_spectrum(oracle, 100)
    # Products of a vector of zeros and ones in float32 would be the limit; here all is float64 but the unit vectors.
    assert found.eigenvalues == pytest.approx(sorted(DEGENERATE), abs=1e-11)
    assert sum(found.shares) == pytest.approx(1.0) and set(found.probe) == {0}
    assert found.loss == 3.0 and found.num_probes == 0
    assert found.num_products == oracle.num_products == len(DEGENERATE)


def test_exact_spectrum_refuses_what_is_too_large():
    with pytest.raises(ConfigError, match="85 trainable parameters"):
        exact_spectrum(oracle_of(matrix(DEGENERATE)), 84)


def test_quadrature_nodes_and_weights_by_hand():
    # [[2, 1], [1, 2]]: eigenvalues 1 and 3, eigenvectors (1, -1) and (1, 1) over root 2, first entries squared 1/2.
    nodes, weights = quadrature([2.0, 2.0], [1.0])
    assert nodes == pytest.approx([1.0, 3.0]) and weights == pytest.approx([0.5, 0.5])
    assert quadrature([5.0], []) == ([5.0], [1.0])


def test_each_start_integrates_polynomials_exactly():
    """m nodes give `v'H^k v / v'v` for every k below 2m: what makes it a quadrature."""
    h = matrix([-2.0, -0.1, 0.0, 0.2, 0.7, 1.0, 1.5, 3.0])
    oracle = oracle_of(h)
    found = lanczos_spectrum(oracle, 1, 3)
    assert oracle.num_products == found.num_products == 3
    problem = oracle._problem
    assert problem is not None
    v = problem.space.random_normal(problem.gradient, problem.seed + 1)
    for power in range(6):
        expected = float(v @ torch.linalg.matrix_power(h, power) @ v / (v @ v))
        got = sum(share * value**power for value, share in zip(found.eigenvalues, found.shares, strict=True))
        assert got == pytest.approx(expected, rel=1e-10, abs=1e-12)
    beyond = float(v @ torch.linalg.matrix_power(h, 6) @ v / (v @ v))
    assert sum(s * x**6 for x, s in zip(found.eigenvalues, found.shares, strict=True)) != pytest.approx(
        beyond, rel=1e-6
    )


def test_the_mean_over_starts_is_the_trace():
    """`n sum_k share_k theta_k` is Hutchinson's estimate: within four standard errors of the trace."""
    eigenvalues = [0.1 * index for index in range(60)]
    found = lanczos_spectrum(oracle_of(matrix(eigenvalues)), 40, 5)
    by_probe = [0.0] * 40
    for value, share, probe in zip(found.eigenvalues, found.shares, found.probe, strict=True):
        by_probe[probe] += 40 * 60 * share * value
    spread = torch.tensor(by_probe, dtype=torch.float64)
    assert abs(float(spread.mean()) - sum(eigenvalues)) < 4.0 * float(spread.std()) / math.sqrt(40)
    assert len(set(by_probe)) == 40, "every start is another vector"


def test_a_space_that_is_exhausted_ends_a_start():
    found = lanczos_spectrum(oracle_of(matrix([2.0] * 10)), 2, 8)
    assert found.num_products == 2 and found.eigenvalues == pytest.approx([2.0, 2.0])


def test_numerical_rank_is_a_count_where_the_spectrum_is_exact():
    found = exact_spectrum(oracle_of(matrix(DEGENERATE)), 100)
    ranks = [numerical_rank(found, 85, cutoff) for cutoff in (1e-1, 9e-3, 4e-3, 1e-4, 1e-8)]
    assert [rank.value for rank in ranks] == [1.0, 3.0, 4.0, 5.0, 25.0]  # the negative one counts by its size
    assert all(rank.standard_error is None for rank in ranks)


def test_numerical_rank_of_the_quadrature_is_within_its_error():
    found = lanczos_spectrum(oracle_of(matrix(DEGENERATE)), 30, 20)
    rank = numerical_rank(found, 85, 1e-3)
    assert rank.standard_error is not None and 0.0 < rank.standard_error < 1.0
    assert abs(rank.value - 5.0) < 4.0 * rank.standard_error
    assert max(found.eigenvalues) == pytest.approx(100.0, rel=1e-8)


def test_products_that_are_not_finite_are_refused():
    h = matrix([1.0, 2.0, 3.0])
    h[0, 0] = float("nan")
    for measure in (lambda: exact_spectrum(oracle_of(h), 10), lambda: lanczos_spectrum(oracle_of(h), 1, 2)):
        with pytest.raises(NumericalError, match="not finite"):
            measure()
