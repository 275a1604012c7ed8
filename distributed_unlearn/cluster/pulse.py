"""Who still answers while a call runs: every worker, and the head of the cluster."""

import logging
import socket
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayError

from distributed_unlearn.cluster.actor import Placement
from distributed_unlearn.errors import WorkerError

ASK_SECONDS = 10.0
"""Between a worker's answer and the next question, and between two looks at the head."""
NAME_SECONDS = 30.0
"""A worker that has not answered a question for this long is named: within 45 s of its last sign of life."""
HEAD_SECONDS = 30.0
"""How long the head of a given cluster may be gone; it may be restarted. Ray itself aborts the driver after 60 s."""
LOCAL_HEAD_SECONDS = 3.0
"""The same for a local Ray, whose head nobody restarts."""
CONNECT_SECONDS = 2.0
LONGEST_SECONDS = 5.0
"""Counted between two looks at the workers at most: a driver that was stopped itself must not blame them for it."""
_LOG = logging.getLogger(__name__)


class HeadPulse:
    """Whether the head of the cluster (its GCS) accepts connections; a look at most every `ASK_SECONDS`.

    Without a head Ray ends the driver after 60 s, with a line of its own and exit code 1, and nothing can be done then.
    """

    def __init__(self, address: str, patience_seconds: float) -> None:
        """Look at `address`, host:port; `patience_seconds` without a connection are borne."""
        host, _, port = address.rpartition(":")
        self._place = host.strip("[]"), int(port)
        self._patience = patience_seconds
        self._looked = time.monotonic()
        self._missed_since: float | None = None
        self.is_gone = False

    def check(self) -> None:
        """Raise where the head is gone for longer than is borne.

        Raises:
            WorkerError: it is gone.
        """
        now = time.monotonic()
        if now - self._looked < ASK_SECONDS and self._missed_since is None:
            return
        self._looked = now
        try:
            socket.create_connection(self._place, CONNECT_SECONDS).close()
            self._missed_since = None
        except OSError as error:
            self._missed_since = now if self._missed_since is None else self._missed_since
            if now - self._missed_since < self._patience:
                return
            self.is_gone = True
            raise WorkerError(
                f"no connection to the head of the Ray cluster at {self._place[0]}:{self._place[1]} "
                f"({error.strerror or error})",
                "a cluster whose head (gcs_server) lasts as long as the job",
                "see gcs_server.err among Ray's logs on the head; no checkpoint was written, so the job can "
                "simply be run again",
            ) from None


class WorkerPulse:
    """Questions to every worker that are answered beside its work; names who does not answer, and who does again."""

    def __init__(self, actors: Sequence[Any], placements: Sequence[Placement], patience_seconds: float) -> None:
        """Ask `actors`, in rank order; `patience_seconds` without an answer are borne."""
        self._actors, self._placements, self._patience = actors, placements, patience_seconds
        self._looked, self._clock = time.monotonic(), 0.0
        self._asked: dict[int, tuple[Any, float]] = {}
        self._due = dict.fromkeys(range(len(actors)), 0.0)
        self._named: set[int] = set()

    def check(self, method: str) -> None:
        """Hear who has answered, name who has not for long, ask who is due. `method`: the call under way.

        Raises:
            WorkerError: a worker has been silent for longer than is borne.
        """
        seconds = time.monotonic() - self._looked
        self._looked += seconds
        self._clock += min(seconds, LONGEST_SECONDS)
        self._hear()
        now = self._clock
        for rank, (_, asked) in self._asked.items():
            if now - asked > self._patience:
                raise WorkerError(
                    f"worker {rank} ({self._where(rank)}), which has not answered for {now - asked:.0f} s during "
                    f"'{method}'",
                    "workers that answer while they work",
                    "see whether its process is stopped or its node frozen; nothing was written, so the job can "
                    "simply be run again",
                )
            if now - asked > NAME_SECONDS and rank not in self._named:
                self._named.add(rank)
                _LOG.warning(
                    "worker %d (%s) has not answered for %.0f s during '%s': is its process stopped, or its node "
                    "frozen? The run ends after %.0f s without an answer (cluster.collective_timeout_seconds)",
                    *(rank, self._where(rank), now - asked, method, self._patience),
                )
        for rank, actor in enumerate(self._actors):
            if rank not in self._asked and now >= self._due[rank]:
                try:
                    self._asked[rank] = actor.heartbeat.remote(), now
                except RayError:
                    self._due[rank] = now + ASK_SECONDS  # it is dead, which its call says better

    def _hear(self) -> None:
        if not self._asked:
            return
        questions = {question: rank for rank, (question, _) in self._asked.items()}
        answered, _ = ray.wait(list(questions), num_returns=len(questions), timeout=0)
        for question in answered:
            rank = questions[question]
            del self._asked[rank]
            self._due[rank] = self._clock + ASK_SECONDS
            if rank in self._named:
                self._named.discard(rank)
                _LOG.warning("worker %d answers again", rank)

    def _where(self, rank: int) -> str:
        place = self._placements[rank]
        return f"process {place.process_id} at {place.address}"
