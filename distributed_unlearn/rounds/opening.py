"""What the scoring pass that opens a round finds out for the objective: constants of every prediction that it reads."""

from dataclasses import dataclass

import numpy as np

from distributed_unlearn.config import BaseSolverConfig
from distributed_unlearn.data.sampling import drawn, split_roles
from distributed_unlearn.objectives.constants import Indices, RoundConstants, matched_targets
from distributed_unlearn.objectives.objective import Objective
from distributed_unlearn.rounds.evaluate import evidence
from distributed_unlearn.workers.client import Workers
from distributed_unlearn.workers.evidence import PredictionEvidence


@dataclass(frozen=True, eq=False)
class Unseen:
    """What texts are like that a model was never trained on; known once, at the start of the job.

    Later rounds may have damaged the weights, and then everything is hard.
    """

    holdout: PredictionEvidence | None = None
    """Of the holdout set by the job's checkpoint; None where nothing reads it."""
    base: PredictionEvidence | None = None
    """Of all rounds' forget sets by `data.base_model`; None where no target comes from that."""


def drawn_retain_records(objective: Objective, solver: BaseSolverConfig, round_index: int, retain: Indices) -> Indices:
    """The retain records that some step of the round will draw, sorted: draws are a pure function of the seed."""
    uses_forget, uses_retain = objective.forget_needs is not None, objective.retain_needs is not None
    _, num_retain = split_roles(solver.gradient_batch, uses_forget, uses_retain)
    return drawn(solver.seed, round_index, solver.max_steps, "retain", retain, num_retain)


def opening_constants(
    workers: Workers,
    objective: Objective,
    forget: Indices,
    retain: Indices,
    unseen: Unseen,
    micro_batch_size: int,
) -> RoundConstants:
    """Score what the objective needs to know the start of, at the round's first weights.

    Args:
        workers: at the round's first weights.
        objective: as it was built.
        forget: the forget set.
        retain: the retain records that will be drawn; of a large retain set not all.
        unseen: where targets come from.
        micro_batch_size: records that go through the model at once on one rank.
    """
    forget_needs, retain_needs = objective.forget_needs, objective.retain_needs
    wanted = [
        indices
        for needs, indices in ((forget_needs, forget), (retain_needs, retain))
        if needs is not None and (needs.start or needs.target)
    ]
    if not wanted:
        return RoundConstants.none()
    start = evidence(workers, np.concatenate(wanted), micro_batch_size)
    target, sample = np.full(len(start.nll), np.nan), np.empty(0)
    if forget_needs is not None and forget_needs.target:
        of_forget = np.repeat(np.isin(start.indices, forget), start.num_tokens)
        if unseen.base is not None:
            target[of_forget] = unseen.base.of(np.unique(forget)).log_odds
        else:
            assert unseen.holdout is not None, "neither a holdout set nor a base model to take targets from"
            sample = unseen.holdout.log_odds
            target[of_forget] = matched_targets(start.log_odds[of_forget], sample)
    return RoundConstants(start.indices, start.num_tokens, start.nll, start.log_odds, target, sample)
