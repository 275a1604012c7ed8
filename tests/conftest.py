"""Environment of every test: no network, one thread, CPU unless there is a GPU, and no token file in anyone's home."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tiny_job import TinyJob

# Before torch, transformers or Ray are imported, which read these once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["RAY_AUTH_MODE"] = "disabled"  # else a local Ray writes ~/.ray/auth_token
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # and listens on loopback only
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ.pop("RAY_ADDRESS", None)
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> "TinyJob":
    """A two-layer Llama with its tokenizer, records of six people and a job file. Read only."""
    from tiny_job import make_tiny_job

    return make_tiny_job(tmp_path_factory.mktemp("tiny"))
