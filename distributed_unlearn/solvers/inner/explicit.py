"""The Hessian as a matrix, column by column from exact products with unit vectors, and its eigendecomposition.

For models with up to a few thousand trainable parameters: n exact products a step, and on rank 0 `8 n^2` bytes for the
matrix and about three times as much while it is decomposed (1.6 GB at n = 7,000). The other ranks hold nothing of it.
The driver is sent the spectrum (2 n floats) and searches on it; the coefficients that it answers with are rotated back
by rank 0.
"""

from dataclasses import dataclass

import torch

from distributed_unlearn.errors import ConfigError
from distributed_unlearn.solvers.cubic import solve_cubic_spectrum
from distributed_unlearn.solvers.inner.proposal import NO_PROPOSAL, Proposal
from distributed_unlearn.solvers.problem import StepProblem
from distributed_unlearn.solvers.protocols import StepOracle, StepStart, Trial
from distributed_unlearn.solvers.solution import Result

_CHUNK = 64  # columns a call: each call answers long before a worker counts as hung


def refuse_if_too_large(num_trainable: int, max_parameters: int) -> None:
    """The limit of the methods that write the Hessian down.

    Raises:
        ConfigError: more trainable parameters than `max_parameters`.
    """
    if num_trainable > max_parameters:
        gib = 32 * num_trainable**2 / 2**30
        raise ConfigError(
            f"{num_trainable:,} trainable parameters for an explicit Hessian, which would take about {gib:,.1f} GiB on "
            f"rank 0 and {num_trainable:,} products a step",
            f"at most solver.max_parameters = {max_parameters:,}",
            "choose solver.method scurenewton, make fewer parameters trainable (model.trainable), or raise "
            "solver.max_parameters if rank 0 has the memory",
        )


class ExplicitShard:
    """`advance(k)` adds columns k, k + 1, ... to the matrix, `advance()` is its spectrum, `candidate(*s)` is `V s`."""

    def __init__(self, problem: StepProblem, max_parameters: int) -> None:
        refuse_if_too_large(problem.space.num_entries, max_parameters)
        self._problem, self._size = problem, problem.space.num_entries
        self._columns: list[torch.Tensor] = []
        """Of the Hessian, float64; empty but on rank 0, and after the decomposition."""
        self._vectors: torch.Tensor | None = None

    def advance(self, *values: float) -> tuple[float, ...]:
        """With a first column: `n`, after a chunk of products. Without: eigenvalues and `V'g`, 2 n floats.

        NaN and infinities in the matrix come back as NaN eigenvalues. All ranks must call this.
        """
        if not values:
            return self._decompose()
        first = int(values[0])
        for index in range(first, min(first + _CHUNK, self._size)):
            column = self._problem.space.gather(self._problem.product(self._unit(index)))
            if column is not None:
                self._columns.append(column.to("cpu", torch.float64))
        return (float(self._size),)

    def _unit(self, index: int) -> torch.Tensor:
        """This rank's part of the unit vector `e_index`."""
        full = torch.zeros(self._size)
        full[index] = 1.0
        return self._problem.space.scatter(full, self._problem.gradient)

    def _decompose(self) -> tuple[float, ...]:
        gradient = self._problem.space.gather(self._problem.gradient)
        found: list[float] = []
        if gradient is not None:
            matrix = torch.stack(self._columns, dim=1)
            self._columns = []
            if bool(torch.isfinite(matrix).all()):
                matrix = 0.5 * (matrix + matrix.T)  # the products' rounding is not symmetric
                eigenvalues, self._vectors = torch.linalg.eigh(matrix)
                found = [*eigenvalues.tolist(), *(self._vectors.T @ gradient.to("cpu", torch.float64)).tolist()]
            else:
                found = [float("nan")] * (2 * self._size)
        return tuple(self._problem.space.broadcast(found, 2 * self._size))

    def candidate(self, *values: float) -> torch.Tensor:
        """The update with these coordinates in the eigenbasis."""
        full = None if self._vectors is None else self._vectors @ torch.tensor(values, dtype=torch.float64)
        return self._problem.space.scatter(full, self._problem.gradient)

    def accept(self) -> None:
        """Nothing is remembered."""


@dataclass(frozen=True)
class ExplicitSpec:
    """An explicit Hessian of at most `max_parameters` rows."""

    max_parameters: int
    measures_trials: bool = True
    separates_roles: bool = False

    def start(self, problem: StepProblem) -> ExplicitShard:
        """See `InnerSpec.start`.

        Raises:
            ConfigError: more trainable parameters than `max_parameters`.
        """
        return ExplicitShard(problem, self.max_parameters)


class ExplicitSpectrum:
    """Eigenvalues and rotated gradient of a step, assembled at the first use."""

    def __init__(self, oracle: StepOracle) -> None:
        self._oracle = oracle
        self._found: tuple[torch.Tensor, torch.Tensor] | None = None
        self.num_products = 0

    def get(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`lambda` ascending and `V'g`, float64 [n] each."""
        if self._found is None:
            size = 1
            while self.num_products < size:
                size = int(self._oracle.advance(float(self.num_products))[0])
                self.num_products = min(self.num_products + _CHUNK, size)
            values = torch.tensor(self._oracle.advance(), dtype=torch.float64)
            self._found = values[:size], values[size:]
        return self._found


class ExplicitCubicInner:
    """The exact minimiser of the cubic model over all trainable weights; another M afterwards costs nothing."""

    num_krylov_steps = 0

    def __init__(self, oracle: StepOracle, max_parameters: int) -> None:
        self._oracle = oracle
        self.spec = ExplicitSpec(max_parameters)
        self._coefficients: tuple[float, ...] = ()
        self._spectrum = ExplicitSpectrum(oracle)

    @property
    def num_products(self) -> int:
        """Of the current step: n."""
        return self._spectrum.num_products

    def begin(self, start: StepStart) -> None:
        """A new step."""
        self._gradient_norm, self._spectrum = start.metric_gradient_norm, ExplicitSpectrum(self._oracle)

    def propose(self, cubic_coefficient: float) -> Proposal:
        """Minimise in the eigenbasis; the first call assembles and decomposes the matrix."""
        eigenvalues, rotated = self._spectrum.get()
        solution = solve_cubic_spectrum(eigenvalues, rotated, cubic_coefficient)
        if solution.result is Result.nonfinite:
            return NO_PROPOSAL
        self._coefficients = solution.coefficients
        s = torch.tensor(solution.coefficients, dtype=torch.float64)
        return Proposal(
            alpha=solution.alpha,
            gamma=solution.gamma,
            predicted_reduction=solution.predicted_reduction,
            curvature=float((eigenvalues * s * s).sum()),
            residual=solution.residual_norm / self._gradient_norm,
            smallest_ritz_value=float(eigenvalues[0]),
            largest_ritz_value=float(eigenvalues[-1]),
            result=solution.result,
        )

    def attempt(self) -> Trial:
        """Apply the last proposal tentatively."""
        return self._oracle.candidate(*self._coefficients)


class PseudoInverseInner:
    """`Delta = -H^+ g`, where `H^+` leaves out eigenvalues of size at most `cutoff max_i |lambda_i|`."""

    num_krylov_steps = 0

    def __init__(self, oracle: StepOracle, cutoff: float, max_parameters: int) -> None:
        self._oracle, self._cutoff = oracle, cutoff
        self.spec = ExplicitSpec(max_parameters)
        self._coefficients: tuple[float, ...] = ()
        self._spectrum = ExplicitSpectrum(oracle)

    @property
    def num_products(self) -> int:
        """Of the current step: n."""
        return self._spectrum.num_products

    def begin(self, start: StepStart) -> None:
        """A new step."""
        self._gradient_norm, self._spectrum = start.metric_gradient_norm, ExplicitSpectrum(self._oracle)

    def propose(self) -> Proposal:
        """The pseudo-inverse step; `predicted_reduction` is the quadratic model's, of either sign.

        The residual is what the cut leaves of the gradient; the result is negative_curvature where an eigenvalue that
        is kept is negative (the step then climbs along it).
        """
        eigenvalues, rotated = self._spectrum.get()
        if not (bool(torch.isfinite(eigenvalues).all()) and bool(torch.isfinite(rotated).all())):
            return NO_PROPOSAL
        kept = eigenvalues.abs() > self._cutoff * eigenvalues.abs().max()
        s = torch.where(kept, -rotated / torch.where(kept, eigenvalues, 1.0), 0.0)
        self._coefficients = tuple(s.tolist())
        curvature = float((eigenvalues * s * s).sum())
        left = float(torch.linalg.vector_norm(torch.where(kept, 0.0, rotated)))
        return Proposal(
            predicted_reduction=-float(rotated @ s) - 0.5 * curvature,
            curvature=curvature,
            residual=left / self._gradient_norm,
            smallest_ritz_value=float(eigenvalues[0]),
            largest_ritz_value=float(eigenvalues[-1]),
            result=Result.negative_curvature if bool((kept & (eigenvalues < 0.0)).any()) else Result.successful,
        )

    def attempt(self) -> Trial:
        """Apply the last proposal tentatively."""
        return self._oracle.candidate(*self._coefficients)
