"""What ranks handed back, and how it is compared."""

import math
import pickle
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from tests.engine.cases import Case, Truth, assemble
from tests.engine.ranks import RanksFailedError

SUMS = 2e-5
"""fp32 sums in another order, against float64: a few thousand roundings of 6e-8, of either sign."""
STEP = 2e-4
"""A whole step: the same errors through a Krylov basis, a small linear solve and a difference of weights."""


class Results:
    """Runs a set of ranks once per world size and hands out the sections that every rank finished."""

    def __init__(self, folder: Path, run: Callable[[int, Path], object]) -> None:
        self._folder, self._run = folder, run
        self._known: dict[int, tuple[list[dict[str, Any]], RanksFailedError | None]] = {}

    def _ranks(self, world_size: int) -> tuple[list[dict[str, Any]], RanksFailedError | None]:
        if world_size not in self._known:
            folder, failure = self._folder / str(world_size), None
            try:
                self._run(world_size, folder)
            except RanksFailedError as error:
                failure = error
            self._known[world_size] = [_sections(folder, rank) for rank in range(world_size)], failure
        return self._known[world_size]

    def of(self, world_size: int, key: str) -> list[Any]:
        """One section of every rank, in rank order.

        Raises:
            RanksFailedError: the ranks failed before or in this section.
        """
        ranks, failure = self._ranks(world_size)
        if failure is not None and not all(key in rank for rank in ranks):
            raise failure
        return [rank[key] for rank in ranks]


def _sections(folder: Path, rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with (
        suppress(FileNotFoundError, EOFError, pickle.UnpicklingError),
        (folder / f"sections.{rank}").open("rb") as file,
    ):
        while True:
            key, value = pickle.load(file)
            found[key] = value
    return found


def gathered(ranks: list[dict[str, Any]], key: str) -> dict[str, torch.Tensor]:
    """A vector of every rank as full parameters."""
    return assemble([rank[key] for rank in ranks], ranks[0]["layout"])


def close(value: float, truth: float, tolerance: float, what: str) -> None:
    assert math.isfinite(value) and abs(value - truth) <= tolerance * abs(truth), (
        f"{what}: {value} against {truth}, relative error {abs(value - truth) / abs(truth):.2e}"
    )


def close_vectors(value: torch.Tensor, truth: torch.Tensor, tolerance: float, what: str) -> None:
    error = float((value.double() - truth.double()).norm() / truth.double().norm())
    assert error <= tolerance, f"{what}: relative error {error:.2e}"


def assert_derivatives(ranks: list[dict[str, Any]], truth: Truth) -> None:
    """Loss, gradient, product and Krylov matrix, and that all ranks have the same scalars."""
    for rank in ranks:
        assert rank["start"] == ranks[0]["start"] and rank["columns"] == ranks[0]["columns"]
        assert rank["loss"] == ranks[0]["loss"]
    first = ranks[0]
    close(first["loss"], truth.loss, SUMS, "loss")
    close(first["start"].loss, truth.loss, SUMS, "loss at the start of the step")
    flatten = truth.entries.flatten
    close_vectors(flatten(gathered(ranks, "gradient")), truth.gradient, SUMS, "gradient")
    close_vectors(flatten(gathered(ranks, "hvp")), truth.hvp, SUMS, "product")
    close(first["start"].gradient_norm, float(truth.gradient.norm()), SUMS, "gradient norm")
    scale = max(abs(value) for value in truth.diagonals + truth.off_diagonals)
    found = [column.diagonal for column in first["columns"]], [column.off_diagonal for column in first["columns"]]
    for values, expected in zip(found, (truth.diagonals, truth.off_diagonals), strict=True):
        # Errors of T are relative to its norm, not to each entry.
        assert max(abs(a - b) for a, b in zip(values, expected, strict=True)) <= STEP * scale, (values, expected)


def assert_step(ranks: list[dict[str, Any]], truth: Truth) -> None:
    """One whole SCureNewton step: its record and the weights' change."""
    record, expected = ranks[0]["record"], truth.record
    for name in ("accepted", "result", "num_rejections", "num_krylov_steps", "num_products"):
        assert getattr(record, name) == getattr(expected, name), name
    for name in ("alpha", "gamma", "cubic_coefficient", "update_norm", "predicted_reduction", "smallest_ritz_value"):
        close(getattr(record, name), getattr(expected, name), 5 * STEP, name)
    close_vectors(truth.entries.flatten(gathered(ranks, "update")), truth.update, STEP, "update")
    close(ranks[0]["round_update_norm"], float(truth.update.norm()), STEP, "norm of the round's update")


def case_results(results: Results, case: Case) -> list[dict[str, Any]]:
    return results.of(case.world_size, str(case))
