"""Calls the command line in this process, and what a refusal must look like."""

import signal
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from distributed_unlearn.cli import INCOMPLETE, main


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


def call(capsys: pytest.CaptureFixture[str], arguments: Sequence[str]) -> Outcome:
    """Run a command; the handler of SIGTERM that it installs is taken back."""
    capsys.readouterr()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        code = main(list(arguments))
    finally:
        signal.signal(signal.SIGTERM, handler)
    out, err = capsys.readouterr()
    return Outcome(code, out, err)


def succeed(capsys: pytest.CaptureFixture[str], arguments: Sequence[str]) -> Outcome:
    """It ended as it should; `INCOMPLETE` too, since two steps on a tiny model need not forget anything."""
    outcome = call(capsys, arguments)
    assert outcome.code in (0, INCOMPLETE), outcome.err
    assert "Traceback" not in outcome.err
    return outcome


def assert_refused(outcome: Outcome, code: int, kind: str, *texts: str) -> None:
    """One error in three sentences, no traceback, and each of `texts` in it."""
    assert outcome.code == code, outcome.err
    assert outcome.err.count(f"error ({kind}): got ") == 1 == outcome.err.count("error (")
    assert outcome.err.count("\n  expected: ") == 1 == outcome.err.count("\n  to fix it: ")
    assert "Traceback" not in outcome.err and "Traceback" not in outcome.out
    for text in texts:
        assert text in outcome.err
