"""The built-in check on two stage-3 ranks, and what cannot be opened."""

import pytest

from distributed_unlearn.commands.check import tolerance_for
from tests.engine.plans import CHECKS

pytestmark = pytest.mark.slow


def report_of(results, name, dtype, check):
    ranks = results.of(2, f"check {name} {dtype} {check.product} {check.mode} {check.reference}")
    assert ranks[1] is None
    return ranks[0]


@pytest.mark.parametrize(("name", "dtype", "check"), CHECKS)
def test_errors_are_within_the_tolerances(name, dtype, check, results):
    report = report_of(results, name, dtype, check)
    tolerance = tolerance_for(dtype, report.reference)
    assert report.loss_relative_error < tolerance.gradient
    assert report.gradient_relative_error < tolerance.gradient
    assert report.hvp_relative_error < tolerance.hvp
    assert report.symmetry_error < tolerance.symmetry
    assert (report.segments, report.world_size, report.mode, report.product) == (3, 2, check.mode, check.product)
    assert report.frozen_rows == (1 if name in ("llama", "gemma") else 0)
    automatic = "double_vjp" if check.product == "gauss_newton" else "double_backward"
    assert report.reference == (automatic if check.reference == "auto" else check.reference)


def test_precision_is_what_the_dtype_says(results):
    """float64 that were float32 inside, or float32 that were bfloat16, would pass the loose bounds above."""
    errors = {dtype: [] for dtype in ("float64", "float32", "bfloat16")}
    for name, dtype, check in CHECKS:
        if check.reference == "auto":
            report = report_of(results, name, dtype, check)
            errors[dtype].append(max(report.hvp_relative_error, report.gradient_relative_error))
    assert max(errors["float64"]) < 1e-13
    assert 1e-8 < min(errors["float32"]) and max(errors["float32"]) < 2e-5
    assert 1e-3 < min(errors["bfloat16"])


REFUSED = [
    *(
        (f"{name}{suffix}", kind, message)
        for name, kind, message in (
            ("nan", "NumericalError", "NaN"),
            ("pickled", "ModelError", "safetensors"),
            ("absent", "ModelError", "without a readable config.json"),
            ("lacking", "ModelError", "lack 2 weights (model.layers.0.mlp.up_proj.weight, model.norm.weight"),
            ("cut off", "ModelError", "cannot be loaded"),
        )
        for suffix in ("", " unsharded")
    ),
    ("blockless", "ModelError", "cannot be cut into segments"),
    ("pattern", "ModelError", "matches none of 20"),
]


@pytest.mark.parametrize(("name", "kind", "message"), REFUSED)
def test_what_cannot_be_opened_is_refused_on_every_rank(name, kind, message, results):
    """The NaN is in the last rank's shard only; the other rank must refuse as well, or it would wait for ever."""
    for refused in results.of(2, "refused"):
        assert refused[name][0] == kind and message in refused[name][1]


def test_a_model_without_blocks_opens_unsharded_and_says_why(results):
    for refused in results.of(2, "refused"):
        facts = refused["blockless facts"]
        assert facts.num_segments == 1 and "_no_split_modules" in facts.segment_fallback
        assert refused["facts"].num_segments == 3 and refused["facts"].segment_fallback is None
