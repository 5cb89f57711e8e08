"""A running system, and functions that stop its children at a chosen point of a fork."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from tests.fixtures.processes import Worker
from tests.fixtures.redis_server import RedisServer
from tests.support.guests import MIB
from tests.support.system.scheduler import Scheduler
from tests.support.system.staging_view import StagingView, leftovers

T = TypeVar("T")

#: Limits that make a fork of a few MiB large: at most 50 files or 4 MiB inline, then chunks of 1 MiB or 100 files.
SMALL_LIMITS = {
    "FORKVM_INLINE_FILES": "50",
    "FORKVM_INLINE_BYTES": str(4 * MIB),
    "FORKVM_CHUNK_FILES": "100",
    "FORKVM_CHUNK_BYTES": str(MIB),
}


@dataclass(frozen=True)
class System:
    """A running system: its Redis, its worker, its one client."""

    server: RedisServer
    worker: Worker
    scheduler: Scheduler

    def pids(self) -> list[int]:
        """The worker's main process, its children, and Redis."""
        return [self.worker.pid, *self.worker.children, self.server.pid]

    def assert_left_nothing_in(self, *directories: Path) -> None:
        """Wait until all messages are processed, and check that no staging is left."""
        self.scheduler.wait_quiet()
        for directory in directories:
            assert leftovers(directory) == []


class StartSystem(Protocol):
    def __call__(self, env: Mapping[str, str] | None = None, *, concurrency: int = 2) -> System: ...


def spin_until(find: Callable[[], T | None], what: str, timeout: float = 20.0) -> T:
    """Poll fast, for conditions that hold for milliseconds; returns what was found as soon as it is true."""
    deadline = time.monotonic() + timeout
    while True:
        found = find()
        if found:
            return found
        assert time.monotonic() < deadline, f"not within {timeout:g} s: {what}"
        time.sleep(0.0005)


@contextmanager
def stopped_in_the_middle(
    worker: Worker, staging: StagingView, also: Callable[[], bool] = lambda: True
) -> Iterator[list[int]]:
    """As `stopped_when`, while a chunked fork is half done and `also` holds."""

    def half_done() -> bool:
        return staging.is_in_the_middle() and also()

    with stopped_when(worker, half_done, "a half-done fork") as children:
        yield children


@contextmanager
def stopped_when(worker: Worker, condition: Callable[[], bool], what: str) -> Iterator[list[int]]:
    """Stop the worker's children while `condition` holds, and yield their pids.

    Those that still run continue at the end.
    """
    children = worker.children

    def stop() -> bool:
        if not condition():
            return False
        send(children, signal.SIGSTOP)
        if condition():
            return True
        send(children, signal.SIGCONT)
        return False

    spin_until(stop, what)
    try:
        yield children
    finally:
        send(children, signal.SIGCONT)


def send(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
