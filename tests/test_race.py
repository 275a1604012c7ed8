"""The referee's own arithmetic: divergences, times to a level, and means over seeds."""

import importlib
import math
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def load():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield importlib.import_module


def test_divergence_by_hand(load):
    """Of a certain and an even coin: 1/2 log(4/3) + 1/4 log(2/3) + 1/4 log 2; of disjoint ones log 2."""
    p, q = torch.tensor([[1.0, 1e-30], [1.0, 1e-30]]).log(), torch.tensor([[0.5, 0.5], [1e-30, 1.0]]).log()
    first = 0.5 * math.log(4 / 3) + 0.25 * math.log(2 / 3) + 0.25 * math.log(2)
    assert load("judge").divergence(p, q) == pytest.approx((first + math.log(2)) / 2, rel=1e-6)
    assert load("judge").divergence(p, p) == 0.0


def course(load, name, seed, wars):
    contestants = load("contestants")
    points = [
        contestants.Point(10.0 * k, 2.0 * k, k, war, {"forget": 0.1 * seed, "retain": 0.0, "holdout": 0.0}, {}, 0.0)
        for k, war in enumerate(wars, start=1)
    ]
    return contestants.Course(name, seed, points)


def test_summary_means_over_seeds_and_says_none_where_a_seed_never_got_there(load):
    courses = [
        course(load, "a", 1, [0.90, 0.96, 0.985]),
        course(load, "a", 2, [0.95, 0.99, 0.97]),
        course(load, "b", 1, [0.90, 0.95]),
        course(load, "b", 2, [0.80, 0.94]),
    ]
    results = load("race_results")
    found = results.summary(courses)
    assert found["a"]["tug_of_war"] == pytest.approx(0.9775) and found["a"]["js_forget"] == pytest.approx(0.15)
    assert (found["a"]["seconds_to_0_95"], found["a"]["seconds_to_0_98"]) == (3.0, 5.0)
    assert found["a"]["units_to_0_98"] == 25.0
    assert found["b"]["seconds_to_0_95"] is None and found["b"]["units_to_0_98"] is None
    text = results.table({"demo": found})
    assert "| demo | a | 0.978 | 0.150 |" in text and "| never | never |" in text


def test_a_race_is_taken_up_only_where_it_is_the_same(load, tmp_path):
    race, path = load("race"), tmp_path / "race.json"
    assert race.kept_courses(path, {"units": [5]}) is None
    kept = [course(load, "a", 1, [0.9, 0.96])]
    race.write_json(path, {"key": {"units": [5]}, "courses": [race.asdict(each) for each in kept]})
    assert race.kept_courses(path, {"units": [5]}) == kept
    assert race.kept_courses(path, {"units": [10]}) is None


def test_digits_by_class_match_nothing_and_their_seeds_differ(load, tmp_path):
    problems = load("race_problems")
    first, other = (problems.digits(tmp_path / str(seed), seed, by_class=False) for seed in (0, 1))
    assert first.job.forget != other.job.forget and len(first.job.forget.record_ids) == 150
    assert problems.digits(tmp_path / "class", 0, by_class=True).objective.name == "delete"
    assert (tmp_path / "0" / "initial" / "config.json").exists()
