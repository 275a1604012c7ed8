"""Which cluster, and who can reach a local one: a token, loopback. Does not import Ray, which reads the environment."""

import os
import secrets
import sys

from distributed_unlearn.config import ClusterConfig
from distributed_unlearn.errors import ConfigError


def ray_address(config: ClusterConfig) -> str | None:
    """The cluster to connect to: the job's, else the surrounding Ray job's; None starts a local one.

    Raises:
        ConfigError: neither `host:port` nor `auto`. Ray itself would start an unprotected cluster for `local` and run
            the driver elsewhere for `ray://`.
    """
    address = config.address or os.environ.get("RAY_ADDRESS") or None  # Ray takes an empty variable for none, too
    if address is None or address == "auto":
        return address
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not (port.isdecimal() and 0 < int(port) < 2**16):
        raise ConfigError(
            f"the Ray address '{address}' ({'cluster.address' if config.address else 'environment RAY_ADDRESS'})",
            "host:port of a cluster's head (6379 is Ray's own choice of port), or auto for one on this machine",
            "correct it, or leave both empty for a local Ray; `ray job submit` is for http:// addresses",
        )
    return address


def secure_local_cluster(config: ClusterConfig) -> None:
    """Where a local cluster will be started, keep it on 127.0.0.1 and protect it with a token of this run alone.

    Ray on Linux listens on all interfaces whatever node address it is given, unless clusters of several machines
    are switched off; the variable for that is named after the systems where off is the default. Ray would write a
    token file that every user of the machine can read; a token in the environment of the driver, which Ray's own
    processes inherit, leaves nothing behind. A user's own RAY_AUTH_MODE is kept. Ray reports no usage unless the user
    has asked for it. Must run before Ray is imported; where Ray was imported already, Ray's own rule stands.
    """
    if ray_address(config) is not None or "ray" in sys.modules:
        return
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def use_given_token() -> None:
    """Send the token that the environment names, also where nobody said so: Ray itself would not.

    Must run before Ray is imported. A user's own RAY_AUTH_MODE is kept.
    """
    if {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ):
        os.environ.setdefault("RAY_AUTH_MODE", "token")
