"""Every architecture that is meant to work: gradient and product on two stage-3 ranks against a float64 reference."""

import pickle

import pytest

from tests.causal_families import ALL, write_family
from tests.engine.family_programs import FamilyPlan
from tests.engine.ranks import run_on_ranks

pytestmark = pytest.mark.slow

NAMES = tuple(ALL)
TOLERANCE = 1e-5
"""float32 chains of a few thousand roundings of 6e-8, of either sign; 2e-6 at most was seen."""


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    for name in NAMES:
        write_family(name, folder / "source")
    plan = FamilyPlan(folder / "source", NAMES)
    run_on_ranks("tests.engine.family_programs:check_families", 2, folder / "ranks", plan)
    found = {}
    with (folder / "ranks" / "sections.0").open("rb") as file:
        while len(found) < len(NAMES):
            name, report = pickle.load(file)
            found[name] = report
    return found


@pytest.mark.parametrize("name", NAMES)
def test_gradient_and_product_agree_with_float64(name, reports):
    report = reports[name]
    if isinstance(report, Exception):
        raise report
    assert report.segments == 3 and report.world_size == 2
    assert report.loss_relative_error < TOLERANCE and report.gradient_relative_error < TOLERANCE
    assert report.hvp_relative_error < TOLERANCE and report.symmetry_error < TOLERANCE
