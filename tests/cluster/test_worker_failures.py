"""Whose failure is reported, how, and after how long: on fake actors and a fake clock, without Ray's processes."""

from types import SimpleNamespace

import pytest
from fake_ray import NEVER, FakeActor, FakeRay, FakeRef
from ray import exceptions
from ray.exceptions import (
    ActorDiedError,
    ActorPlacementGroupRemoved,
    ActorUnavailableError,
    ActorUnschedulableError,
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayError,
    RaySystemError,
    RayTaskError,
    RuntimeEnvSetupError,
)

from distributed_unlearn.cluster import failures, leftovers, pulse, worker_group
from distributed_unlearn.cluster.actor import Placement
from distributed_unlearn.cluster.failures import PATIENCE_SECONDS, SilentWorkerError, call_failure, first_cause, states
from distributed_unlearn.cluster.pulse import HEAD_SECONDS, LOCAL_HEAD_SECONDS, HeadPulse, WorkerPulse
from distributed_unlearn.cluster.worker_group import RayWorkerGroup
from distributed_unlearn.config import ClusterConfig
from distributed_unlearn.errors import ModelError, ResourceError, WorkerError


def raised(cause: Exception) -> RayTaskError:
    return RayTaskError("call", f"a traceback\n{cause}", cause, "title", 1, "127.0.0.1").as_instanceof_cause()


RESET = raised(RuntimeError("Connection reset by peer"))
DEATH = ActorDiedError()
GONE = ActorUnavailableError("The node is gone.", None)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    ray = FakeRay()
    for module in (failures, pulse):
        for name in ("ray", "time"):
            monkeypatch.setattr(module, name, ray)
    return ray


def test_a_node_that_is_missed_late_is_the_cause(fake):
    """Rank 0 raises at once; rank 1, on a node that is gone, is missed after 2.3 s, on a loaded machine after 12."""
    for seconds in (0.05, 2.3, 12.0):
        fake.now = 0.0
        calls, actors = [FakeRef(0.0, RESET), FakeRef(seconds, GONE)], [FakeActor(fake), FakeActor(fake, NEVER)]
        assert first_cause(RESET, 0, calls, actors) == (GONE, 1)
        assert fake.now == seconds


def test_a_heartbeat_shows_the_death_first(fake):
    calls, actors = [FakeRef(0.0, RESET), FakeRef(NEVER)], [FakeActor(fake), FakeActor(fake, 3.0, DEATH)]
    assert first_cause(RESET, 0, calls, actors) == (DEATH, 1)
    assert fake.now == 3.0


def test_peers_that_raised_or_answer_do_not_hide_the_dead_one(fake):
    calls = [FakeRef(0.1, RESET), FakeRef(0.0, RESET), FakeRef(NEVER), FakeRef(5.0, DEATH), FakeRef(0.0, "done")]
    delays = (NEVER, NEVER, 0.0, NEVER, NEVER)  # of heartbeats: rank 0 is known to live because it raised
    actors = [FakeActor(fake, delay) for delay in delays]
    assert first_cause(RESET, 1, calls, actors) == (DEATH, 3)


def test_a_bug_is_reported_at_once_where_the_others_live(fake):
    """They wait in a collective and answer: nobody is waited for."""
    bug, calls = raised(AssertionError("bug")), [FakeRef(NEVER), FakeRef(0.0), FakeRef(NEVER)]
    actors = [FakeActor(fake, 0.2), FakeActor(fake), FakeActor(fake, 0.1)]
    assert first_cause(bug, 1, calls, actors) == (bug, 1)
    assert fake.now == 0.2 and [actor.num_asked for actor in actors] == [1, 0, 1]


def test_a_silent_peer_is_waited_for_and_then_blamed(fake):
    """A stopped process: its peer gives up in a collective, and its own call and heartbeat never end."""
    calls = [FakeRef(0.0, RESET), FakeRef(NEVER), FakeRef(NEVER)]
    cause, rank = first_cause(RESET, 0, calls, [FakeActor(fake), FakeActor(fake, 1.0), FakeActor(fake, NEVER)])
    assert isinstance(cause, SilentWorkerError) and rank == 2
    assert fake.now == PATIENCE_SECONDS < 30
    error = call_failure(cause, rank, "train_step")
    assert isinstance(error, WorkerError) and "a traceback" in error.worker_traceback
    assert error.got == (
        "worker 2, which does not answer during 'train_step' (worker 0 raised: Connection reset by peer)"
    )


@pytest.mark.parametrize("error", [DEATH, raised(ModelError("a", "b", "c"))], ids=["death", "user's mistake"])
def test_what_needs_no_other_account_is_reported_at_once(fake, error):
    actors = [FakeActor(fake), FakeActor(fake)]
    assert first_cause(error, 0, [FakeRef(0.0, error), FakeRef(NEVER)], actors) == (error, 0)
    assert fake.waits == [] and actors[1].num_asked == 0


def test_all_heartbeats_are_asked_for_at_once(fake):
    actors = [FakeActor(fake), FakeActor(fake, NEVER), FakeActor(fake, 1.0, DEATH), FakeActor(fake, NEVER)]
    answers = states(actors)
    assert answers == ["rank 0: open_model for 12 s", *(f"rank {rank}: no answer" for rank in (1, 2, 3))]
    assert fake.waits == [4] and fake.now == failures.HEARTBEAT_SECONDS


DEATHS = {
    "node": NodeDiedError("the node died"),
    "raylet": LocalRayletDiedError(),
    "environment": RuntimeEnvSetupError("no such package"),
    "unschedulable": ActorUnschedulableError("nowhere to go"),
    "place removed": ActorPlacementGroupRemoved(),
    "lost": ObjectLostError("ab" * 28, None, ""),
    "system": RaySystemError("the store is broken"),
    "unavailable": GONE,
    "died": DEATH,
    "nothing to say": RayError(),
}


@pytest.mark.parametrize("name", DEATHS)
def test_what_is_not_raised_by_the_worker_is_its_death(name):
    error = call_failure(DEATHS[name], 3, "train_step")
    assert isinstance(error, WorkerError) and error.exit_code == 8
    assert error.got.startswith("worker 3, which died during 'train_step' (") and not error.got.endswith("()")


def test_an_error_of_the_worker_is_said_to_be_raised():
    error = call_failure(RESET, 0, "train_step")
    assert isinstance(error, WorkerError) and "worker 0, which raised an error during 'train_step'" in error.got
    assert "Connection reset by peer" in error.got and "a traceback" in error.worker_traceback
    mistake = ModelError("a", "b", "c")
    assert call_failure(raised(mistake), 0, "open_model") is mistake


def test_a_worker_without_memory_gets_a_remedy_for_memory():
    account = "Memory on the node was 15.1GB / 16GB.\nRay killed this worker." + " and so on" * 100
    error = call_failure(OutOfMemoryError(account), 1, "open_model")
    assert isinstance(error, ResourceError) and error.exit_code == 6
    assert "worker 1" in error.got and "15.1GB / 16GB. Ray killed" in error.got and len(error.got) < 500
    assert "micro_batch_size" in error.remedy and "num_workers" in error.remedy


class Watched:
    """Two workers that are asked for their pulse every two seconds of a fake clock."""

    def __init__(self, fake: FakeRay, patience_seconds: float) -> None:
        self.fake, self.actors = fake, [FakeActor(fake, 0.1), FakeActor(fake, 0.1)]
        places = [Placement("a", (), "10.0.0.1", 11), Placement("b", (), "10.0.0.2", 22)]
        self.pulse = WorkerPulse(self.actors, places, patience_seconds)

    def until(self, now: float) -> None:
        while self.fake.now < now:
            self.fake.now += 2.0
            self.pulse.check("accept")


def test_a_worker_that_stops_answering_is_named_within_a_minute(fake, caplog):
    watched = Watched(fake, 1800.0)
    watched.until(600.0)
    assert caplog.messages == [] and 50 <= watched.actors[1].num_asked <= 60
    watched.actors[1].delay = NEVER
    watched.until(660.0)
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("worker 1 (process 22 at 10.0.0.2) has not answered for 3")
    assert "during 'accept'" in caplog.messages[0] and "1800 s" in caplog.messages[0]
    watched.until(900.0)
    assert len(caplog.messages) == 1  # said once
    watched.pulse._asked[1][0].at = 0.0  # its answer comes at last
    watched.actors[1].delay = 0.1
    watched.until(1000.0)
    assert caplog.messages[1:] == ["worker 1 answers again"]


def test_a_worker_that_stays_silent_ends_the_run(fake):
    watched = Watched(fake, 120.0)
    watched.actors[0].delay = NEVER
    with pytest.raises(WorkerError, match=r"worker 0 \(process 11 at 10.0.0.1\), which has not answered for 12\d s"):
        watched.until(1000.0)
    assert fake.now < 140


def test_a_driver_that_was_stopped_itself_blames_nobody(fake, caplog):
    watched = Watched(fake, 120.0)
    watched.until(20.0)
    for actor in watched.actors:
        actor.delay = 4000.0  # asked before; nothing moves while the terminal's Ctrl-Z lasts
    watched.until(40.0)
    fake.now += 3600.0
    watched.until(fake.now + 10)
    assert caplog.messages == []


@pytest.mark.parametrize("patience", [LOCAL_HEAD_SECONDS, HEAD_SECONDS])
def test_a_head_that_is_gone_is_missed_before_ray_aborts_the_driver(fake, monkeypatch, patience):
    listens = [True]

    def connect(place, timeout):
        assert place == ("10.0.0.1", 6379) and timeout <= 5
        if not listens[0]:
            raise ConnectionRefusedError(111, "Connection refused")
        return SimpleNamespace(close=lambda: None)

    monkeypatch.setattr(pulse.socket, "create_connection", connect)
    head = HeadPulse("10.0.0.1:6379", patience)

    def until(now: float) -> None:
        while fake.now < now:
            fake.now += 2.0
            head.check()

    until(100.0)
    listens[0] = False
    until(100.0 + min(patience, 10.0))
    listens[0] = True  # restarted in time
    until(200.0)
    listens[0], gone = False, fake.now
    with pytest.raises(WorkerError, match="head of the Ray cluster at 10.0.0.1:6379 .Connection refused."):
        until(300.0)
    assert patience <= fake.now - gone < 45 and head.is_gone


def test_without_a_head_nothing_is_asked_of_it(monkeypatch, fake):
    """Ray would wait for it, and abort the driver: the workers of this node are killed by their process ids."""

    def refuse(*arguments):
        raise ConnectionRefusedError(111, "Connection refused")

    killed = []
    group = _group(monkeypatch, fake, [FakeActor(fake), FakeActor(fake)])
    fake.kill = lambda *arguments, **options: pytest.fail("asks the head")
    monkeypatch.setattr(worker_group, "remove_placement_group", fake.kill)
    monkeypatch.setattr(pulse.socket, "create_connection", refuse)
    monkeypatch.setattr(leftovers, "_is_rank_actor", lambda pid: True)
    monkeypatch.setattr(leftovers.os, "kill", lambda pid, number: killed.append(pid))
    fake.get_runtime_context = lambda: SimpleNamespace(get_node_id=lambda: "a")
    group._placements, group._placement_group = [Placement("a", (), "10.0.0.1", 11)], object()
    with pytest.raises(WorkerError, match="head of the Ray cluster") as caught:
        group._wait([FakeRef(NEVER), FakeRef(NEVER)], "accept")
    assert caught.value.exit_code == 8 and killed == [11]


def _group(monkeypatch: pytest.MonkeyPatch, fake: FakeRay, actors: list[FakeActor]) -> RayWorkerGroup:
    """A group that was started on fakes."""
    fake.is_initialized = lambda: True
    fake.kill = lambda actor, no_restart: None
    for name in ("ray", "time"):
        monkeypatch.setattr(worker_group, name, fake)
        monkeypatch.setattr(leftovers, name, fake)
    monkeypatch.setattr(RayWorkerGroup, "_reserve", lambda self: ({}, None))
    monkeypatch.setattr(RayWorkerGroup, "_start", lambda self, bundle, place: self._actors.extend(actors))
    return RayWorkerGroup(ClusterConfig(num_workers=len(actors), address="10.0.0.1:6379"))


@pytest.mark.parametrize("name", DEATHS)
def test_the_group_turns_every_error_of_ray_into_ours(monkeypatch, fake, name):
    group = _group(monkeypatch, fake, [FakeActor(fake), FakeActor(fake)])
    with pytest.raises(WorkerError, match="worker 1, which died during 'connect'"):
        group._wait([FakeRef(NEVER), FakeRef(1.0, DEATHS[name])], "connect")
    assert group._actors == []


def test_the_group_blames_the_dead_rank_and_not_its_peer(monkeypatch, fake):
    group = _group(monkeypatch, fake, [FakeActor(fake), FakeActor(fake, NEVER)])
    with pytest.raises(WorkerError, match="worker 1, which died during 'accept'"):
        group._wait([FakeRef(0.0, RESET), FakeRef(4.0, DEATH)], "accept")
    with pytest.raises(AssertionError, match="have been ended"):
        group.call_all("accept")  # instead of no results


def test_the_end_raises_nothing_over_another_error(monkeypatch, fake, caplog):
    """Whatever fails while workers are ended, the first error is the one that is seen."""

    def fails(*arguments, **options):
        raise exceptions.RaySystemError("the head is gone")

    group = _group(monkeypatch, fake, [FakeActor(fake), FakeActor(fake)])
    fake.kill = fake.get_runtime_context = fails
    monkeypatch.setattr(worker_group, "remove_placement_group", fails)
    group._placement_group, group._placements = object(), [object()]
    with pytest.raises(WorkerError, match="worker 0, which died"):
        group._wait([FakeRef(0.0, DEATH), FakeRef(NEVER)], "accept")
    assert len(caplog.messages) == 4 and all("the head is gone" in message for message in caplog.messages)
    group.shutdown()
    assert len(caplog.messages) == 5  # only the processes are looked for again


def test_a_leftover_that_ends_by_itself_is_no_error(monkeypatch, fake):
    class Context:
        def get_node_id(self):
            return "a"

    def gone(pid, number):
        raise ProcessLookupError(pid)

    def sleep(seconds):
        fake.now += seconds

    group = _group(monkeypatch, fake, [FakeActor(fake)])
    group._placements = [worker_group.Placement("a", (), "127.0.0.1", 123)]
    fake.get_runtime_context, fake.sleep = Context, sleep
    monkeypatch.setattr(leftovers, "_is_rank_actor", lambda pid: True)
    monkeypatch.setattr(leftovers.os, "kill", gone)
    leftovers.end_leftovers(group._placements, everywhere=False, patience_seconds=5.0)
    assert fake.now >= 5


def test_the_end_starts_no_new_ray(monkeypatch, fake):
    """Ray's own functions do, where Ray has been shut down before."""
    group = _group(monkeypatch, fake, [FakeActor(fake)])
    fake.is_initialized = lambda: False
    monkeypatch.setattr(worker_group, "remove_placement_group", lambda place: pytest.fail("starts Ray"))
    group._placement_group = object()
    group.shutdown()
