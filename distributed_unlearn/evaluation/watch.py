"""Who is told how an evaluation goes."""

from typing import Protocol


class Watch(Protocol):
    """Told as it happens."""

    def note(self, text: str) -> None:
        """Something worth a line."""
        ...

    def progress(self, text: str, num_done: int, num_total: int) -> None:
        """How far the part of an evaluation named by `text` is; `num_done` is 0 at its start."""
        ...


class Unwatched:
    """Nobody."""

    def note(self, text: str) -> None:
        """Nothing."""

    def progress(self, text: str, num_done: int, num_total: int) -> None:
        """Nothing."""
