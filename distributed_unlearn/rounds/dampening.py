"""A round of the method `ssd`: importances of all weights to the forget set and to all data, then one change."""

import time

from distributed_unlearn.config import SsdConfig
from distributed_unlearn.data.sampling import draw
from distributed_unlearn.records import RoundRecord
from distributed_unlearn.rounds.evaluate import Scores
from distributed_unlearn.rounds.preparation import Session
from distributed_unlearn.rounds.round import Changed, RoundTask, close_round, open_round
from distributed_unlearn.workers.messages import DampeningSpec, Indices

_RECORDS_PER_CALL = 64
"""Of one call, a rank: bounds its time, which is limited."""


def importance_sample(task: RoundTask) -> Indices:
    """The retain records from which the importance to all data is estimated."""
    solver = task.solver
    assert isinstance(solver, SsdConfig)
    if solver.max_retain_records is None:
        return task.retain
    return draw(solver.seed, task.round_index, 0, "importance", task.retain, solver.max_retain_records)


def run_dampened_round(session: Session, task: RoundTask, start: Scores) -> RoundRecord:
    """Dampen what matters to the forget set alone, and leave the result on the workers.

    Raises:
        NumericalError: a gradient that is not finite; the weights are as they were.
    """
    workers, solver = session.workers, task.solver
    assert isinstance(solver, SsdConfig)
    opening, started = open_round(workers, task, start), time.monotonic()
    sample = importance_sample(task)
    workers.begin_dampening()
    size = _RECORDS_PER_CALL * workers.world_size
    with session.events.stage(f"squared gradients of {len(task.forget) + len(sample)} records, one by one"):
        for first in range(0, len(task.forget), size):
            workers.add_importance("forget", task.forget[first : first + size])
        for first in range(0, len(sample), size):
            workers.add_importance("retain", sample[first : first + size])
    done = workers.dampen(
        DampeningSpec(
            selection_weighting=solver.selection_weighting,
            dampening_constant=solver.dampening_constant,
            num_forget=len(task.forget),
            num_sampled=len(sample),
            num_retain=len(task.retain),
        )
    )
    shrunk = "" if done.mean_reduction is None else f", by {done.mean_reduction:.1%} of themselves on average"
    reason = f"dampened: {done.num_weights} weights that matter to the forget set{shrunk}"
    return close_round(workers, task, start, opening, Changed(reason, (), started, 1))
