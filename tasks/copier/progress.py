"""Counting finished work, with a regular call that publishes progress and checks for cancellation."""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import Enum
from typing import TypedDict, final

from tasks.copier.copy_rate import Pace, unbounded

#: Seconds between two calls of `poll`: the delay of a cancellation, and the interval of published progress.
POLL_SECONDS = 0.25


@final
class Progress(TypedDict):
    """The contract's PROGRESS. Files are entries of any type; bytes are logical sizes."""

    files_done: int
    files_total: int
    bytes_done: int
    bytes_total: int
    phase: str


class Cancellation(Enum):
    """Whether the cancellation of a fork was requested."""

    REQUESTED = "requested"
    NOT_REQUESTED = "not requested"

    @classmethod
    def of(cls, requested: object) -> Cancellation:
        """REQUESTED for a true value."""
        return cls.REQUESTED if requested else cls.NOT_REQUESTED


#: Called with the progress so far. Raises ForkError to stop the work.
Poll = Callable[[Progress], None]


class Ticker:
    """Counts finished work, and calls `poll` at most once every `POLL_SECONDS`."""

    def __init__(self, poll: Poll, pace: Pace = unbounded) -> None:
        """`pace` is called for the bytes that are copied, and may wait."""
        self.pace = pace
        self._poll = poll
        #: The end of the last wait: what is copied next began then, or later.
        self._waited = time.monotonic()
        self._next = self._waited + POLL_SECONDS
        self.progress: Progress = {
            "files_done": 0,
            "files_total": 0,
            "bytes_done": 0,
            "bytes_total": 0,
            "phase": "plan",
        }

    def enter(self, phase: str, files_total: int, bytes_total: int) -> None:
        """Begin a phase (`plan`, `copy` or `publish`) with the given totals."""
        self.progress = {**self.progress, "phase": phase, "files_total": files_total, "bytes_total": bytes_total}

    def expect(self, files: int, count: int) -> None:
        """Add entries and bytes to the totals of the phase."""
        self.progress["files_total"] += files
        self.progress["bytes_total"] += count

    def __call__(self, files: int, count: int) -> None:
        """Count `files` finished entries and `count` finished bytes."""
        self.progress["files_done"] += files
        self.progress["bytes_done"] += count
        if time.monotonic() >= self._next:
            self.poll_now()

    def step(self, count: int) -> None:
        """Count copied bytes of a file that is not finished. Waits if they were copied too fast."""
        self(0, count)
        if count:
            self.pace(count, self.poll, time.monotonic() - self._waited)
            self._waited = time.monotonic()

    def poll(self) -> None:
        """Count nothing; call `poll` if it is due."""
        self(0, 0)

    def poll_now(self) -> None:
        """Call `poll` now."""
        self._poll(self.progress)
        self._next = time.monotonic() + POLL_SECONDS
