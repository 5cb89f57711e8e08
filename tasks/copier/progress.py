"""Counting what is done, and looking up now and then whether to go on."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypedDict, final

#: Seconds between two beats: how soon a cancellation is seen, and how often progress is told.
BEAT_SECONDS = 0.25


@final
class Progress(TypedDict):
    """How far a fork is; the contract's PROGRESS. Files are entries of any type, bytes are logical."""

    files_done: int
    files_total: int
    bytes_done: int
    bytes_total: int
    phase: str


#: Called with the progress so far; raises ForkError to stop the work.
Beat = Callable[[Progress], None]


class Ticker:
    """Counts what is done, and calls `beat` at most every `BEAT_SECONDS`."""

    def __init__(self, beat: Beat) -> None:
        self._beat = beat
        self._next = time.monotonic() + BEAT_SECONDS
        self.progress: Progress = {
            "files_done": 0,
            "files_total": 0,
            "bytes_done": 0,
            "bytes_total": 0,
            "phase": "plan",
        }

    def enter(self, phase: str, files_total: int, bytes_total: int) -> None:
        """Begin a phase (`plan`, `copy`, `publish`), of which so much is to be done."""
        self.progress = {**self.progress, "phase": phase, "files_total": files_total, "bytes_total": bytes_total}

    def expect(self, files: int, count: int) -> None:
        """Have so many more entries and bytes to be done than were known before."""
        self.progress["files_total"] += files
        self.progress["bytes_total"] += count

    def __call__(self, files: int, count: int) -> None:
        """Count `files` done entries and `count` done bytes."""
        self.progress["files_done"] += files
        self.progress["bytes_done"] += count
        if time.monotonic() >= self._next:
            self.poll_now()

    def step(self, count: int) -> None:
        """Count bytes within a file."""
        self(0, count)

    def poll(self) -> None:
        """Count nothing; let the beat come through."""
        self(0, 0)

    def poll_now(self) -> None:
        """Let the beat come through at once."""
        self._beat(self.progress)
        self._next = time.monotonic() + BEAT_SECONDS
