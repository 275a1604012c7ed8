"""Which cluster a job connects to, what is refused, and that Ray's own refusals come without a traceback."""

import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray.exceptions import AuthenticationError, RaySystemError

from distributed_unlearn.cluster import session
from distributed_unlearn.cluster.authentication import ray_address, secure_local_cluster
from distributed_unlearn.config import ClusterConfig
from distributed_unlearn.errors import ConfigError, ResourceError, WorkerError

WRONG = (
    "10.0.0.5",
    "head",
    "local",
    "http://127.0.0.1:8265",
    "https://head:8265",
    "ray://head:10001",
    ":6379",
    "head:",
    "head:70000",
)


@pytest.mark.parametrize("address", ["10.0.0.5:6379", "head.example.org:6379", "[fd00::2]:6379", "auto"])
def test_an_address_is_kept(monkeypatch, address):
    assert ray_address(ClusterConfig(address=address)) == address
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert ray_address(ClusterConfig()) == address


def test_an_empty_address_is_none(monkeypatch):
    assert ray_address(ClusterConfig()) is None and ray_address(ClusterConfig(address="")) is None
    monkeypatch.setenv("RAY_ADDRESS", "")
    assert ray_address(ClusterConfig()) is None


def test_the_jobs_address_comes_first(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    assert ray_address(ClusterConfig(address="10.0.0.5:6379")) == "10.0.0.5:6379"


@pytest.mark.parametrize("address", WRONG)
def test_what_is_no_address_is_refused_once_and_clearly(monkeypatch, address):
    with pytest.raises(ConfigError, match="host:port") as caught:
        secure_local_cluster(ClusterConfig(address=address))  # so before Ray is imported
    assert f"'{address}' (cluster.address)" in caught.value.got and caught.value.exit_code == 3
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConfigError) as caught, session.ray_session(ClusterConfig()):
        pass
    assert f"'{address}' (environment RAY_ADDRESS)" in caught.value.got


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[SimpleNamespace]:
    """Ray that connects to nothing, and what was asked of it; SIGTERM is handled as by the command line."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    ray = SimpleNamespace(asked=[], shut_down=0, error=None, num_slow=0)

    def init(**options):
        ray.asked.append(options["address"])
        if ray.num_slow:
            ray.num_slow -= 1
            raise Exception("The current node timed out during startup. This could happen because ...")
        signal.signal(signal.SIGTERM, lambda *_: None)  # as Ray's does
        if ray.error is not None:
            raise ray.error

    def shutdown():
        ray.shut_down += 1

    ray.init, ray.shutdown, ray.is_initialized = init, shutdown, lambda: False
    monkeypatch.setattr(session, "ray", ray)
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    yield ray
    signal.signal(signal.SIGTERM, before)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("address", [None, "10.0.0.5:6379"], ids=["local", "given"])
@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("nobody there\nand more"),
        RuntimeError("version mismatch"),
        ValueError("no such address"),
        AuthenticationError("Token authentication is enabled but no token was found"),
        Exception("whatever"),
        RuntimeError(),
    ],
    ids=["connection", "runtime", "value", "token", "bare", "without a word"],
)
def test_a_refusal_of_ray_comes_without_a_traceback(no_ray, error, address):
    no_ray.error, handler = error, signal.getsignal(signal.SIGTERM)
    config = ClusterConfig(num_workers=1, address=address)
    with pytest.raises(ResourceError) as caught, session.ray_session(config):
        pytest.fail("connected")
    assert (str(error).splitlines() or ["RuntimeError"])[0] in caught.value.got and "and more" not in caught.value.got
    assert "RAY_AUTH_MODE" in caught.value.remedy
    assert no_ray.asked == [address or "local"] and no_ray.shut_down == 1  # what a failed start left
    assert signal.getsignal(signal.SIGTERM) is handler


def test_a_slow_start_of_a_local_ray_is_tried_again(no_ray):
    no_ray.num_slow = 2
    with session.ray_session(ClusterConfig(num_workers=1)):
        assert no_ray.asked == ["local"] * 3 and no_ray.shut_down == 2
    no_ray.num_slow = 3
    with pytest.raises(ResourceError, match="timed out during startup"):
        with session.ray_session(ClusterConfig(num_workers=1)):
            pytest.fail("started")


def test_too_many_workers_for_this_machine(no_ray, monkeypatch):
    monkeypatch.setattr(session.os, "cpu_count", lambda: 4)
    with pytest.raises(ResourceError, match="3 workers of 2 CPU.*machine with 4.*at most 2 workers"):
        with session.ray_session(ClusterConfig(num_workers=3, cpus_per_worker=2)):
            pytest.fail("started")
    assert no_ray.asked == []


def test_a_failure_of_ray_outside_a_call_is_ours(no_ray, monkeypatch):
    ended = []

    class Group:
        def __init__(self, config):
            pass

        def shutdown(self):
            ended.append(True)

    monkeypatch.setattr(session, "RayWorkerGroup", Group)
    with pytest.raises(WorkerError, match="RaySystemError: .*the head is gone") as caught:
        with session.ray_group(ClusterConfig(num_workers=1)):
            raise RaySystemError("the head is gone")
    assert caught.value.exit_code == 8 and ended == [True] and no_ray.shut_down == 1
