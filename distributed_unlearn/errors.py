"""Errors that a user can act on, each with the exit code that the command line returns for it.

Every message says what was got, what was expected and what to do; the command line prints it without
a traceback. A bug of ours stays an ordinary exception (exit code 1, with traceback).
"""

from typing import ClassVar


class UserError(Exception):
    """A mistake in what the user gave us: `got`, `expected` and the `remedy`, in one readable sentence each."""

    exit_code: ClassVar[int] = 2
    kind: ClassVar[str] = "usage"

    def __init__(self, got: str, expected: str, remedy: str) -> None:
        super().__init__(got, expected, remedy)  # all three, so that the error survives pickling between processes
        self.got, self.expected, self.remedy = got, expected, remedy

    def __str__(self) -> str:
        return f"{self.kind}: got {self.got}; expected {self.expected}. To fix it: {self.remedy}"


class ConfigError(UserError):
    """The job file or an override is wrong: unknown key, wrong type, value out of range, contradiction."""

    exit_code, kind = 3, "configuration"


class DataError(UserError):
    """The records are wrong: missing file or field, unknown ids, overlap, empty set, too long for the context."""

    exit_code, kind = 4, "data"


class ModelError(UserError):
    """The checkpoint is wrong: missing folder, not safetensors, no pad token, no blocks at stage 3."""

    exit_code, kind = 5, "model"


class ResourceError(UserError):
    """The machine or cluster cannot hold the job: more workers than CPUs or GPUs, no placement in time."""

    exit_code, kind = 6, "resources"


class NumericalError(UserError):
    """Weights, a loss, a gradient or a product are not finite; no checkpoint was written from them."""

    exit_code, kind = 7, "numerics"


class WorkerError(UserError):
    """A worker raised, died or hung. All other workers have been ended; nothing was written."""

    exit_code, kind = 8, "worker"

    def __init__(self, got: str, expected: str, remedy: str, worker_traceback: str = "", raised: bool = False) -> None:
        """`raised`: a worker's program ended with an error, which other workers would repeat; else one was lost."""
        super().__init__(got, expected, remedy)
        self.args = (got, expected, remedy, worker_traceback, raised)
        self.worker_traceback, self.raised = worker_traceback, raised


class CheckFailedError(UserError):
    """A numerical check ran and its error is above the tolerance."""

    exit_code, kind = 9, "check"


class LedgerError(UserError):
    """The ledger cannot be opened, read or written: missing, damaged, newer than this program, disk full, locked."""

    exit_code, kind = 11, "ledger"


class RequestError(UserError):
    """An erasure request is malformed or unknown, or the table of transitions refuses what was asked of it."""

    exit_code, kind = 12, "request"


class LeaseError(UserError):
    """Another process holds the ledger's lease, or took it over while this one was paused; nothing was written."""

    exit_code, kind = 13, "lease"


class GateError(UserError):
    """A round ran, failed a gate and was rolled back; its requests are pending again."""

    exit_code, kind = 14, "gate"


class StoppedError(UserError):
    """A submitted job was stopped before its end by somebody else; what it had written is whole."""

    exit_code, kind = 15, "stopped"
