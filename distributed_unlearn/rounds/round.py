"""One round: from forget, retain and holdout records to updated weights and a `RoundRecord`.

The round is ordinary mathematics over a worker group: it draws nothing, holds no tensor and knows neither Ray
nor DeepSpeed.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from distributed_unlearn.config import CurvatureConfig, ObjectiveConfig, SolverConfig, SteppingConfig
from distributed_unlearn.data.sampling import draw
from distributed_unlearn.errors import NumericalError
from distributed_unlearn.objectives.build import build_objective
from distributed_unlearn.records import RoundRecord, SetScores, StepRecord
from distributed_unlearn.rounds.evaluate import Scores, evaluate_sets, evidence, score, summarise
from distributed_unlearn.rounds.events import OnStep
from distributed_unlearn.rounds.exposure import measure_exposure
from distributed_unlearn.rounds.methods import OuterSolver, build_solver
from distributed_unlearn.rounds.opening import Unseen, drawn_retain_records, opening_constants
from distributed_unlearn.rounds.state import Course, RoundKeeper
from distributed_unlearn.rounds.verdict import judge
from distributed_unlearn.solvers.stopping import StoppingRule, TwoSampleRule
from distributed_unlearn.workers.client import RemoteOracle, Workers
from distributed_unlearn.workers.messages import RoundSpec

_NUM_PROBE_RECORDS = 64
"""Retain records whose loss the stopping rule follows; scored only once the forget set matches."""


@dataclass(frozen=True, eq=False)
class RoundTask:
    """Records and settings of one round."""

    round_index: int
    forget: np.ndarray
    retain: np.ndarray
    holdout: np.ndarray
    objective: ObjectiveConfig
    solver: SolverConfig
    curvature: CurvatureConfig
    earlier_forget: tuple[np.ndarray, ...] = ()
    erased_before: tuple[np.ndarray, ...] = ()
    """What earlier jobs erased; scored like what earlier rounds forgot."""
    max_evaluated_records: int | None = None

    @property
    def stepping(self) -> SteppingConfig:
        """The solver section of a method that takes steps on an objective."""
        assert isinstance(self.solver, SteppingConfig)
        return self.solver


def scored_sets(task: RoundTask) -> dict[str, np.ndarray]:
    """The records that are scored before and after the round, by set; samples of sets larger than the task's limit."""
    sets = {"forget": task.forget, "retain": task.retain, "holdout": task.holdout}
    for index, earlier in enumerate(task.earlier_forget):
        sets[f"forget_round_{index + 1}"] = earlier
    for index, earlier in enumerate(task.erased_before):
        sets[f"erased_before_{index + 1}"] = earlier
    limit = task.max_evaluated_records
    if limit is None:
        return sets
    seed, index = task.solver.seed, task.round_index
    return {
        name: draw(seed, index, 0, f"evaluate {name}", indices, limit) if len(indices) else indices
        for name, indices in sets.items()
    }


def score_start(workers: Workers, tasks: Sequence[RoundTask]) -> Scores:
    """Scores of every record that any of a job's rounds scores, at the start of the job."""
    wanted = np.concatenate([indices for task in tasks for indices in scored_sets(task).values()])
    return score(workers, wanted, tasks[0].curvature.scoring_batch)


class _Watch:
    """Measures what the stopping rule needs, as rarely as it can."""

    def __init__(
        self,
        workers: Workers,
        task: RoundTask,
        holdout_loss: float | None,
        unseen: Unseen,
        scores: Scores,
        course: Course,
    ) -> None:
        self._workers, self._task, self._started = workers, task, course.started
        self._holdout_loss = holdout_loss if task.stepping.stop.forget_matches_holdout else None
        retain = np.intersect1d(task.retain, scores.indices)
        self._probe = draw(task.solver.seed, task.round_index, 0, "probe", retain, _NUM_PROBE_RECORDS)
        stop = task.stepping.stop
        self._initial_retain_loss = float(scores.of(np.sort(self._probe)).mean_losses.mean())
        self._by_tokens: TwoSampleRule | None = None
        if self._holdout_loss is not None and task.objective.uses_log_odds and unseen.holdout is not None:
            num_predictions = int(scores.of(np.sort(task.forget)).num_tokens.sum())
            self._by_tokens = TwoSampleRule(
                unseen.holdout.log_odds,
                num_predictions,
                stop.level,
                self._initial_retain_loss,
                stop.retain_tolerance_nats,
                stop.patience,
                stop.max_seconds,
            )
        self._rule = self._by_tokens or StoppingRule(
            self._holdout_loss,
            self._initial_retain_loss,
            stop.forget_tolerance_nats,
            stop.retain_tolerance_nats,
            stop.patience,
            stop.max_seconds,
        )
        self._rule.go_on_from(course.num_matching_checks)

    @property
    def num_matching_checks(self) -> int:
        """Consecutive checks so far for which the rule's conditions held."""
        return self._rule.num_consecutive

    def after(self, step: int, accepted: bool) -> tuple[str | None, dict[str, float]]:
        """Reason to stop after this step, or None; and what was measured: nothing where the weights did not change."""
        measured: dict[str, float] = {}
        distance, retain_loss = None, float("nan")
        batch = self._task.curvature.scoring_batch
        skipped = bool((step + 1) % self._task.stepping.stop.check_every_steps)
        if not accepted or (self._holdout_loss is not None and skipped):
            return self._rule.timeout(step, time.monotonic() - self._started), measured
        if self._holdout_loss is not None:
            if self._by_tokens is not None:
                distance = self._by_tokens.distance(evidence(self._workers, self._task.forget, batch).log_odds)
            else:
                losses = score(self._workers, self._task.forget, batch).mean_losses
                distance = float(np.abs(losses - self._holdout_loss).mean())
            measured["forget_distance"] = distance
            if distance <= self._rule.forget_tolerance:
                retain_loss = float(score(self._workers, self._probe, batch).mean_losses.mean())
                measured["retain_probe_excess"] = retain_loss - self._initial_retain_loss
        return self._rule.update(step, distance, retain_loss, time.monotonic() - self._started), measured


def _take_steps(
    task: RoundTask, solver: OuterSolver, watch: _Watch, course: Course, keeper: RoundKeeper, on_step: OnStep
) -> str:
    """Take the steps that are left, add them to `course`; the reason why they ended."""
    for record, measured in zip(course.steps, course.measured, strict=True):
        on_step(record, measured)
    for index in range(len(course.steps), task.stepping.max_steps):
        record = solver.step(index)
        if not np.isfinite(record.loss) or not np.isfinite(record.gradient_norm):
            raise NumericalError(
                f"loss {record.loss} and gradient norm {record.gradient_norm} at step {index + 1} of round "
                f"{task.round_index + 1}",
                "finite values",
                "the weights are as before the step; use float32, a smaller learning rate or a bounded objective",
            )
        reason, measured = watch.after(index, record.accepted)
        course.add(record, measured, watch.num_matching_checks)
        on_step(record, measured)
        if reason is not None:
            return reason
        keeper.save_if_due(course, solver)
    return f"max_steps: all {task.stepping.max_steps} steps were taken"


@dataclass(frozen=True, eq=False)
class Opening:
    """How all sets stand before a round."""

    sets: dict[str, np.ndarray]
    before: dict[str, SetScores]
    scores: Scores
    holdout_loss: float | None
    """At the start of the job; None without a holdout set."""


@dataclass(frozen=True)
class Changed:
    """What a method did to the weights."""

    reason: str
    """Why it ended."""
    steps: tuple[StepRecord, ...]
    started: float
    """On the monotonic clock."""
    num_steps: int | None = None
    """Of a method whose steps leave no record; None: those of `steps`."""


def open_round(workers: Workers, task: RoundTask, start: Scores) -> Opening:
    """Score what the round scores, where the start of the job has not; see `run_round`."""
    sets = scored_sets(task)
    if task.round_index:
        before, scores = evaluate_sets(workers, sets, task.curvature.scoring_batch)
    else:
        before, scores = summarise(sets, start), start
    holdout = summarise({"holdout": sets["holdout"]}, start).get("holdout")
    return Opening(sets, before, scores, None if holdout is None else holdout.loss_nats_per_token)


def close_round(workers: Workers, task: RoundTask, start: Scores, opening: Opening, done: Changed) -> RoundRecord:
    """Score again and judge."""
    wall_seconds = time.monotonic() - done.started
    after, now = evaluate_sets(workers, opening.sets, task.curvature.scoring_batch)
    exposure = measure_exposure(workers, opening.sets["forget"], opening.sets["holdout"], task.curvature.scoring_batch)
    return RoundRecord(
        round_index=task.round_index,
        num_forget_records=len(task.forget),
        num_retain_records=len(task.retain),
        holdout_loss_nats_per_token=opening.holdout_loss,
        stop_reason=done.reason,
        num_steps=len(done.steps) if done.num_steps is None else done.num_steps,
        num_products=sum(step.num_products for step in done.steps),
        update_norm=workers.round_update_norm(),
        wall_seconds=wall_seconds,
        steps=done.steps,
        before=opening.before,
        after=after,
        verdict=judge(opening.sets, start, now),
        exposure=exposure,
    )


def run_round(
    workers: Workers, task: RoundTask, start: Scores, unseen: Unseen, keeper: RoundKeeper, on_step: OnStep
) -> RoundRecord:
    """Run one round on the workers' current weights and leave the new weights there.

    Args:
        workers: With an open model.
        task: The round.
        start: All records of `scored_sets(task)` at the start of the job. What an unseen record is like is taken from
            there: an earlier round may have damaged the weights, and then everything is hard.
        unseen: What targets of single tokens are taken from, at the start of the job too.
        keeper: Saves the round's state now and then, and may have one from which the round goes on.
        on_step: Told of each step, also of those that the state holds.

    Raises:
        ConfigError: a state to go on from that this round does not fit.
        NumericalError: a loss or gradient that is not finite; the weights are those before the step.
    """
    batch, solver_config = task.curvature.scoring_batch, task.stepping
    opening = open_round(workers, task, start)
    objective = build_objective(task.objective, opening.holdout_loss)
    retain = drawn_retain_records(objective, solver_config, task.round_index, task.retain)
    constants = opening_constants(workers, objective, task.forget, retain, unseen, batch)
    spec = RoundSpec(
        task.round_index,
        task.forget,
        task.retain,
        task.objective,
        solver_config,
        task.curvature,
        opening.holdout_loss,
        replace(constants, label_seed=solver_config.seed),
    )
    workers.begin_round(spec)
    solver = build_solver(RemoteOracle(workers.group), solver_config)
    keeper.restore(workers, opening.before, solver)
    course = Course.begin(opening.before, keeper.found)
    watch = _Watch(workers, task, opening.holdout_loss, unseen, opening.scores, course)
    reason = _take_steps(task, solver, watch, course, keeper, on_step)
    return close_round(workers, task, start, opening, Changed(reason, tuple(course.steps), course.started))
