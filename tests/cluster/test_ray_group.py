"""Worker groups on a local Ray: the same numbers as in one process, and failures that name their cause."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray
from processes import PATIENT_RAY
from safetensors.torch import load_file
from tiny_job import FORGET, HOLDOUT, TinyJob

from distributed_unlearn.cluster.failures import states
from distributed_unlearn.cluster.in_process import InProcessGroup
from distributed_unlearn.cluster.session import ray_group, ray_session
from distributed_unlearn.config import (
    ClusterConfig,
    CurvatureConfig,
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    SaveConfig,
    SCureNewtonConfig,
    SelectionConfig,
    StopConfig,
)
from distributed_unlearn.data.prepare import PreparedData, prepare_data
from distributed_unlearn.errors import ModelError, WorkerError
from distributed_unlearn.records import RoundRecord
from distributed_unlearn.rounds.opening import Unseen
from distributed_unlearn.rounds.round import RoundTask, run_round, score_start
from distributed_unlearn.rounds.state import RoundKeeper, StateKeeper
from distributed_unlearn.workers.client import Workers
from distributed_unlearn.workers.group import WorkerGroup

# The method "thread" would end this very process, and leave Ray's.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800, method="signal")]

CLUSTER = ClusterConfig(
    num_workers=2,
    zero_stage=3,
    use_gpu="never",
    placement_timeout_seconds=900.0,
    collective_timeout_seconds=900.0,
    call_timeout_seconds=900.0,
)


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    if (os.cpu_count() or 1) < CLUSTER.num_workers:
        pytest.skip("fewer processors than workers")
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in PATIENT_RAY.items():
            patch.setenv(name, value)
        with ray_session(CLUSTER):
            yield
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture(scope="module")
def prepared(tiny: TinyJob) -> PreparedData:
    forget, holdout = SelectionConfig(subjects=FORGET), SelectionConfig(subjects=HOLDOUT)
    return prepare_data(ModelConfig(path=str(tiny.model)), DataConfig(path=str(tiny.records)), (forget,), holdout)


def _run(group: WorkerGroup, tiny: TinyJob, prepared: PreparedData, folder: Path) -> RoundRecord:
    """One round of three steps, written to `folder`."""
    model = ModelConfig(path=str(tiny.model))
    group.call_all("set_corpus", group.share(prepared.corpus))
    group.call_all("open_model", model, "float32", 3)
    task = RoundTask(
        round_index=0,
        forget=prepared.partition.forget_rounds[0],
        retain=prepared.partition.retain(0),
        holdout=prepared.partition.holdout,
        objective=ObjectiveConfig(name="graddiff"),
        solver=SCureNewtonConfig(
            inner="krylov",
            metric="identity",
            max_krylov_steps=3,
            gradient_batch=5,  # odd, so that the ranks have different shares
            curvature_batch=3,
            max_steps=3,
            stop=StopConfig(forget_matches_holdout=False),
        ),
        curvature=CurvatureConfig(product="hessian", micro_batch_size=2),
    )
    workers = Workers(group)
    record = run_round(
        workers,
        task,
        score_start(workers, [task]),
        Unseen(),
        RoundKeeper(StateKeeper(folder, SaveConfig(), "", workers), 0, (), None),
        lambda record, measured: None,
    )
    folder.mkdir()
    group.call_all("export", str(folder), model, SaveConfig())
    return record


def _alive(process_ids: tuple[int, ...], patience_seconds: float = 60.0) -> list[int]:
    deadline = time.monotonic() + patience_seconds
    while (alive := [pid for pid in process_ids if _is_actor(pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    return alive


def _is_actor(pid: int) -> bool:
    try:
        return "RankActor" in " ".join(psutil.Process(pid).cmdline())
    except psutil.Error:
        return False


def _update(tiny: TinyJob, folder: Path) -> np.ndarray:
    before, after = load_file(tiny.model / "model.safetensors"), load_file(folder / "model.safetensors")
    return np.concatenate([(after[name] - before[name]).double().numpy().ravel() for name in sorted(before)])


def test_two_actors_compute_what_one_process_does_and_report_a_bug(tiny: TinyJob, prepared, tmp_path):
    """Two tests on one group, because starting one takes seconds."""
    alone = _run(InProcessGroup(ClusterConfig(num_workers=1, use_gpu="never")), tiny, prepared, tmp_path / "alone")
    with ray_group(CLUSTER) as group:
        together = _run(group, tiny, prepared, tmp_path / "together")
        assert group.world_size == 2 and len(set(group.process_ids)) == 2
        assert os.getpid() not in group.process_ids and all(map(_is_actor, group.process_ids))
        _assert_same(alone, together)
        one, two = _update(tiny, tmp_path / "alone"), _update(tiny, tmp_path / "together")
        assert np.linalg.norm(one - two) <= 1e-3 * np.linalg.norm(one) and np.linalg.norm(one) > 0.01

        # A bug: the exception's own text and where it was raised, and no worker left.
        with pytest.raises(WorkerError, match="raised an error during 'train_step'") as caught:
            group.call_all("train_step", 0)
        assert "AssertionError" in caught.value.worker_traceback
        assert "worker.py" in caught.value.worker_traceback and "in train_step" in caught.value.worker_traceback
        assert caught.value.exit_code == 8
        assert _alive(group.process_ids) == []


def _assert_same(alone: RoundRecord, together: RoundRecord) -> None:
    # float32 sums in another order: about 1e-6 a step, and three steps build on each other.
    assert len(alone.steps) == len(together.steps) == 3
    for ours, theirs in zip(alone.steps, together.steps, strict=True):
        assert theirs.loss == pytest.approx(ours.loss, rel=1e-4)
        assert theirs.gradient_norm == pytest.approx(ours.gradient_norm, rel=1e-4)
        assert theirs.alpha == pytest.approx(ours.alpha, rel=1e-3)
        assert theirs.smallest_ritz_value == pytest.approx(ours.smallest_ritz_value, rel=1e-3, abs=1e-3)
        assert (theirs.accepted, theirs.num_rejections) == (ours.accepted, ours.num_rejections)
    for name, scores in alone.after.items():
        assert together.after[name].num_records == scores.num_records
        assert together.after[name].loss_nats_per_token == pytest.approx(scores.loss_nats_per_token, rel=1e-4)
    assert together.update_norm == pytest.approx(alone.update_norm, rel=1e-3)


def test_a_users_mistake_inside_a_worker_surfaces_as_itself(tmp_path):
    with ray_group(CLUSTER.model_copy(update={"num_workers": 1})) as group:
        model = ModelConfig(path=str(tmp_path / "none"))
        with pytest.raises(ModelError) as caught:
            group.call_all("open_model", model, "float32", 3)
        assert str(tmp_path / "none") in caught.value.got and caught.value.remedy and caught.value.exit_code == 5
        assert _alive(group.process_ids) == []


def test_a_silent_worker_is_named_and_ended(tiny: TinyJob):
    with ray_group(CLUSTER) as group:
        model = ModelConfig(path=str(tiny.model))
        group.call_all("open_model", model, "float32", 3)
        # Warm up what is to answer in time: the thread of the heartbeat starts with the first of them.
        assert all("idle" in state for state in states(group._actors))
        # Only now: importing and loading may rightly take longer than this call.
        group._config = CLUSTER.model_copy(update={"call_timeout_seconds": 2.0})
        process_ids = group.process_ids
        try:
            os.kill(process_ids[1], signal.SIGSTOP)
            before = time.monotonic()
            with pytest.raises(WorkerError, match="'open_model' that took over 2 s") as caught:
                group.call_all("open_model", model, "float32", 3)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process_ids[1], signal.SIGKILL)
            raise
        assert time.monotonic() - before < 300  # 2 s, 30 s for the silent one, 5 s to end it, and the machine's load
        assert "rank 1: no answer" in caught.value.got and "rank 0: no answer" not in caught.value.got
        assert caught.value.exit_code == 8
        assert _alive(process_ids) == []  # the stopped one too
    assert ray.is_initialized()
