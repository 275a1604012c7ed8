"""Which records a training step sees, and how often an epoch shows each of them."""

from collections import Counter

import numpy as np
import pytest

from distributed_unlearn.config import TrainConfig
from distributed_unlearn.engine.training import plan_training, records_of_step


@pytest.mark.parametrize(
    ("num_records", "batch_size", "sizes"), [(65, 64, [64, 1]), (64, 64, [64]), (7, 20, [7]), (9, 4, [4, 4, 1])]
)
def test_every_record_is_seen_exactly_as_often_as_there_are_epochs(num_records, batch_size, sizes):
    plan = plan_training(TrainConfig(epochs=3, batch_size=batch_size), num_records, 2, 8)
    records = np.arange(100, 100 + num_records)
    steps = [records_of_step(5, step, records, plan.batch_size) for step in range(plan.num_steps)]
    assert [len(step) for step in steps] == 3 * sizes
    for epoch in range(3):
        seen = Counter(np.concatenate(steps[epoch * len(sizes) : (epoch + 1) * len(sizes)]).tolist())
        assert seen == Counter(records.tolist())
    assert not np.array_equal(np.concatenate(steps[: len(sizes)]), np.concatenate(steps[len(sizes) : 2 * len(sizes)]))
