"""The referee's own arithmetic: divergences, times to a level, and means over seeds."""

import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch

FILE = Path(__file__).parents[1] / "benchmarks" / "race.py"


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FILE.parent))
        yield patch


@pytest.fixture(scope="module")
def race(monkeypatch_module):
    spec = importlib.util.spec_from_file_location("race", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["race"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_divergence_by_hand(race):
    """Of a certain and an even coin: 1/2 log(4/3) + 1/4 log(2/3) + 1/4 log 2; of disjoint ones log 2."""
    p, q = torch.tensor([[1.0, 1e-30], [1.0, 1e-30]]).log(), torch.tensor([[0.5, 0.5], [1e-30, 1.0]]).log()
    first = 0.5 * math.log(4 / 3) + 0.25 * math.log(2 / 3) + 0.25 * math.log(2)
    assert sys.modules["judge"].divergence(p, q) == pytest.approx((first + math.log(2)) / 2, rel=1e-6)
    assert sys.modules["judge"].divergence(p, p) == 0.0


def course(race, name, seed, wars):
    points = [
        race.Point(10.0 * k, 2.0 * k, k, war, {"forget": 0.1 * seed, "retain": 0.0, "holdout": 0.0}, {}, 0.0)
        for k, war in enumerate(wars, start=1)
    ]
    return race.Course(name, seed, points)


def test_summary_means_over_seeds_and_says_none_where_a_seed_never_got_there(race):
    courses = [
        course(race, "a", 1, [0.90, 0.96, 0.985]),
        course(race, "a", 2, [0.95, 0.99, 0.97]),
        course(race, "b", 1, [0.90, 0.95]),
        course(race, "b", 2, [0.80, 0.94]),
    ]
    found = race.summary(courses)
    assert found["a"]["tug_of_war"] == pytest.approx(0.9775) and found["a"]["js_forget"] == pytest.approx(0.15)
    assert (found["a"]["seconds_to_0_95"], found["a"]["seconds_to_0_98"]) == (3.0, 5.0)
    assert found["a"]["units_to_0_98"] == 25.0
    assert found["b"]["seconds_to_0_95"] is None and found["b"]["units_to_0_98"] is None
