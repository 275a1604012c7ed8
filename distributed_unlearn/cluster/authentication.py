"""Who can reach a local cluster: a token, and loopback. Does not import Ray, which reads the environment then."""

import os
import secrets
import sys

from distributed_unlearn.config import ClusterConfig


def ray_address(config: ClusterConfig) -> str | None:
    """The cluster to connect to: the job's, else the surrounding Ray job's; None starts a local one."""
    return config.address or os.environ.get("RAY_ADDRESS")


def secure_local_cluster(config: ClusterConfig) -> None:
    """Where a local cluster will be started, keep it on 127.0.0.1 and protect it with a token of this run alone.

    Ray on Linux listens on all interfaces whatever node address it is given, unless clusters of several machines
    are switched off; the variable for that is named after the systems where off is the default. Ray would write a
    token file that every user of the machine can read; a token in the environment of the driver, which Ray's own
    processes inherit, leaves nothing behind. A user's own RAY_AUTH_MODE is kept. Must run before Ray is imported;
    where Ray was imported already, Ray's own rule stands.
    """
    if ray_address(config) is not None or "ray" in sys.modules:
        return
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
