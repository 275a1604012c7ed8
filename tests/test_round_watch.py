"""What a round measures for its stopping rule: nothing after a step that changed no weight."""

import time

import numpy as np
import pytest

from distributed_unlearn.config import CurvatureConfig, ObjectiveConfig, SCureNewtonConfig, StopConfig
from distributed_unlearn.rounds.evaluate import Scores
from distributed_unlearn.rounds.opening import Unseen
from distributed_unlearn.rounds.round import RoundTask, _Watch
from distributed_unlearn.rounds.state import Course
from distributed_unlearn.workers.messages import RecordScores

PATIENCE, HARD = 3, 2.0


class CountedWorkers:
    """Every record is as hard as the holdout set; counts the calls."""

    world_size, calls = 1, 0

    def score(self, indices, micro_batch_size):
        self.calls += 1
        ones = np.ones(len(indices), dtype=np.int64)
        return RecordScores(indices, HARD * ones, ones, ones)


@pytest.fixture
def workers():
    return CountedWorkers()


@pytest.fixture
def watch(workers):
    stop = StopConfig(patience=PATIENCE)
    task = RoundTask(
        0,
        np.arange(3),
        np.arange(3, 6),
        np.arange(6, 9),
        ObjectiveConfig(name="holdout_matched"),
        SCureNewtonConfig(stop=stop),
        CurvatureConfig(),
    )
    ones = np.ones(9)
    start = Scores(np.arange(9), HARD * ones, ones, ones)
    return _Watch(workers, task, HARD, Unseen(), start, Course({}, [], [], 0, time.monotonic()))


def test_a_rejected_step_scores_nothing_and_does_not_count_towards_patience(watch, workers):
    for step in range(2 * PATIENCE):
        assert watch.after(step, accepted=False) == (None, {})
    assert workers.calls == 0 and watch.num_matching_checks == 0


def test_accepted_steps_count_and_end_the_round(watch, workers):
    reasons = [watch.after(step, accepted=True)[0] for step in range(PATIENCE - 1)]
    watch.after(7, accepted=False)
    assert reasons == [None] * (PATIENCE - 1) and watch.num_matching_checks == PATIENCE - 1
    reason, measured = watch.after(8, accepted=True)
    assert reason is not None and measured == {"forget_distance": 0.0, "retain_probe_excess": 0.0}
    assert workers.calls == 2 * PATIENCE  # the forget set and the probe
