"""Gloo listens where the rendezvous is, and nowhere else."""

import json
import os
import socket
import subprocess
import sys
from collections import namedtuple

import psutil
import pytest
from processes import ROOT

from distributed_unlearn.engine import communicator

Address = namedtuple("Address", "family address")

PROGRAM = """
import json, os, psutil, sys
from distributed_unlearn.engine.communicator import RankSpec, connect, open_store
host = sys.argv[1]
store, port = open_store(host, 60.0)
ours = {port}
connect(RankSpec(0, 1, 0, 1), host, port, store, 60.0, use_gpu=False)
found = [c.laddr for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN]
print(json.dumps([os.environ["GLOO_SOCKET_IFNAME"], [a.ip for a in found if a.port not in ours]]))
"""


def _interfaces() -> dict[str, str]:
    """IPv4 address of each interface that is up."""
    up = {name for name, stats in psutil.net_if_stats().items() if stats.isup}
    addresses = psutil.net_if_addrs().items()
    return {a.address: name for name, many in addresses if name in up for a in many if a.family == socket.AF_INET}


def _connect(host: str, **variables: str) -> tuple[str, set[str]]:
    """The interface that was chosen, and where a process in a group of one listens."""
    kept = {name: value for name, value in os.environ.items() if name != "GLOO_SOCKET_IFNAME"}
    environment = {**kept, "PYTHONPATH": str(ROOT), **variables}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, host], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    interface, listening = json.loads(run.stdout)
    return interface, {ip.removeprefix("::ffff:") for ip in listening}


@pytest.mark.parametrize(("backend", "name"), [("gloo", "lo"), ("nccl", "=lo")])
def test_each_backend_is_told_the_shared_network(backend, name, monkeypatch):
    """NCCL takes a bare name for the beginning of names."""
    variable = f"{backend.upper()}_SOCKET_IFNAME"
    monkeypatch.setenv(variable, "")
    communicator._choose_interface(backend, "127.0.0.1")
    assert os.environ[variable] == name
    monkeypatch.setenv(variable, "eth7")
    communicator._choose_interface(backend, "127.0.0.1")
    assert os.environ[variable] == "eth7"


@pytest.mark.timeout(900, method="signal")
def test_gloo_listens_on_the_nodes_own_address_alone():
    """The machine's name stands for one address at most, so that one of the two fails where it decides."""
    interfaces = _interfaces()
    assert _connect("127.0.0.1") == (interfaces["127.0.0.1"], {"127.0.0.1"})
    others = [address for address in interfaces if not address.startswith("127.")]
    if not others:
        pytest.skip("this machine has no other address")
    assert _connect(others[0]) == (interfaces[others[0]], {others[0]})


@pytest.mark.timeout(900, method="signal")
def test_the_users_choice_is_kept():
    interfaces = _interfaces()
    other = next((address for address in interfaces if not address.startswith("127.")), "127.0.0.1")
    assert _connect("127.0.0.1", GLOO_SOCKET_IFNAME=interfaces[other]) == (interfaces[other], {other})


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ("127.0.0.1", "lo"),
        ("127.0.1.1", "lo"),  # what many a machine's name stands for; no interface lists it
        ("10.0.0.7", "eth1"),
        ("fe80::1", "eth1"),
        ("10.9.9.9", None),
    ],
)
def test_interface_of_an_address(monkeypatch, own, expected):
    class Probe:
        def __init__(self, family, kind):
            assert family == (socket.AF_INET6 if ":" in own else socket.AF_INET) and kind == socket.SOCK_DGRAM

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def connect(self, place):
            assert place[0] == own

        def getsockname(self):
            return own, 1

    table = {
        "lo": [Address(socket.AF_INET, "127.0.0.1"), Address(socket.AF_INET6, "::1")],
        "eth0": [Address(socket.AF_INET, "192.168.1.4"), Address(socket.AF_PACKET, "02:00:00:00:00:01")],
        "eth1": [Address(socket.AF_INET, "10.0.0.7"), Address(socket.AF_INET6, "fe80::1%eth1")],
    }
    monkeypatch.setattr(communicator.socket, "socket", Probe)
    monkeypatch.setattr(communicator.psutil, "net_if_addrs", lambda: table)
    assert communicator._interface_towards(own) == expected


def test_no_route_is_left_to_the_store_to_report():
    assert communicator._interface_towards("no-such-host.invalid") is None
