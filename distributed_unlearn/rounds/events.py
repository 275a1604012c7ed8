"""What a run tells whoever watches it: a command prints it, a program may do as it likes. Nothing here prints."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from distributed_unlearn.config import JobConfig
from distributed_unlearn.data.prepare import PreparedData
from distributed_unlearn.records import RoundRecord, StepRecord
from distributed_unlearn.workers.messages import ModelFacts

OnStep = Callable[[StepRecord, Mapping[str, float]], None]
"""Called after each outer step with its record and what was measured after it."""
OnTrainingStep = Callable[[int, float], None]
"""Called after each optimiser step with its index and loss."""


class RunEvents(Protocol):
    """Called by a run as it goes; an exception raised here ends the run as one of its own would."""

    def prepared(self, job: JobConfig, data: PreparedData) -> None:
        """The records are read and split; nothing has been started."""
        ...

    def stage(self, text: str) -> AbstractContextManager[None]:
        """A long piece of work, for the length of the block."""
        ...

    def note(self, text: str) -> None:
        """Something that whoever started the run should know."""
        ...

    def opened(self, facts: ModelFacts) -> None:
        """The model that is to change is open."""
        ...

    def round(self, round_index: int, num_rounds: int, max_steps: int) -> AbstractContextManager[OnStep]:
        """A round, for the length of the block, which yields what is to be called after each step."""
        ...

    def round_ended(self, record: RoundRecord) -> None:
        """A round has ended."""
        ...

    def training(self, num_steps: int) -> AbstractContextManager[OnTrainingStep]:
        """A training, for the length of the block, which yields what is to be called after each step."""
        ...


class Unwatched:
    """`RunEvents` that do nothing."""

    def prepared(self, job: JobConfig, data: PreparedData) -> None:
        """Nothing."""

    def stage(self, text: str) -> AbstractContextManager[None]:
        """Nothing."""
        return nullcontext()

    def note(self, text: str) -> None:
        """Nothing."""

    def opened(self, facts: ModelFacts) -> None:
        """Nothing."""

    def round(self, round_index: int, num_rounds: int, max_steps: int) -> AbstractContextManager[OnStep]:
        """Nothing."""
        return nullcontext(lambda record, measured: None)

    def round_ended(self, record: RoundRecord) -> None:
        """Nothing."""

    def training(self, num_steps: int) -> AbstractContextManager[OnTrainingStep]:
        """Nothing."""
        return nullcontext(lambda step, loss: None)
