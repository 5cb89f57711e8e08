"""What every task is given: the worker's bounds, the results, and a way to send further tasks."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

from redis.exceptions import RedisError, ResponseError

from tasks.copier.errors import Code, ForkError, cancelled, describe
from tasks.copier.fork_spec import ForkResult, ForkSpec
from tasks.copier.options import Limits
from tasks.copier.progress import BEAT_SECONDS, Beat, Cancellation, Progress
from tasks.copier.roots import Roots
from tasks.store.recent_forks.forks import ALL_PAGES, Pages, RecentForks, are_few
from tasks.store.redis_errors import cause
from tasks.store.results import Results

log = logging.getLogger(__name__)

#: How long a task waits for the staging that another one holds, before it goes back to the queue, in seconds.
LOCK_WAIT = 1.0
#: How long a task that had to go back stays away, in seconds.
RETRY_SECONDS = 1.0


class RetryLater(Exception):
    """Another process holds what this task needs: the task is sent again in `RETRY_SECONDS`.

    `heartbeat` is the holder's (see `ControlDirectory.heartbeat`), or None where no staging directory exists.
    """

    def __init__(self, heartbeat: int | None) -> None:
        super().__init__(heartbeat)
        self.heartbeat = heartbeat


class Canvas(Protocol):
    """What a client asked to follow its job; see `tasks.delivery.canvas`."""

    def keep(self, results: Results, job_id: str) -> None:
        """Keep it until the job has ended."""


class Send(Protocol):
    """Sends a task by name into the domain that the running one came from, past the clients' own queue."""

    def __call__(self, task: str, kwargs: dict[str, Any], task_id: str) -> None:
        """`task` is one of the names below."""


@dataclass(frozen=True)
class Context:
    """The surroundings of one running task."""

    roots: Roots
    limits: Limits
    results: Results
    send: Send
    #: The queue of the domain, as clients name it.
    queue: str
    #: What is to follow the job that this task was sent for, if its message says so.
    canvas: Canvas | None = None
    #: Notes about forks whose results Redis may have lost.
    recent_forks: RecentForks = field(default_factory=RecentForks)

    def keep_canvas(self, job_id: str) -> None:
        """Keep what follows the job for the task that ends it; to be called once the id is the request's."""
        if self.canvas is not None:
            self.canvas.keep(self.results, job_id)

    def ledger(self, spec: ForkSpec, parent_fd: int, name: str) -> ForkLedger:
        """The ledger of a fork that is to be published as `name` in `parent_fd`."""
        return ForkLedger(self.results, spec.fork_id, partial(self.recent_forks.note_fork, spec, parent_fd, name))

    def beat(self, fork_id: str, part: str, destination: str) -> Beat:
        """Tells the progress of one part of a fork, and raises ForkError cancelled when someone asked for an end.

        Redis being away stops no fork: neither is worth it.
        """
        tell_from = time.monotonic() + BEAT_SECONDS  # what is done before that needs no telling
        results = replace(self.results, patient=False)

        def beat(progress: Progress) -> None:
            if time.monotonic() >= tell_from:
                self.publish_progress(fork_id, part, progress)
            with suppress(RedisError):
                if results.cancellations.is_requested(fork_id):
                    raise cancelled(destination)

        return beat

    def publish_progress(self, fork_id: str, part: str, progress: Progress) -> None:
        """Publish what one part of a fork has done so far, if Redis takes it."""
        with suppress(RedisError):
            replace(self.results, patient=False).states.publish_progress(fork_id, part, progress)


@dataclass(frozen=True)
class ForkLedger:
    """The engine's ledger over Redis, for one fork."""

    results: Results
    fork_id: str
    #: Writes a note about the fork when it has succeeded; see `tasks.store.recent_forks`.
    note: Callable[[ForkResult, Pages], None] | None = None
    #: The FileResults that this process kept, by part.
    pages: Pages = field(default_factory=dict)

    def keep_pages(self, parts: dict[str, list[bytes]], *, anew: bool = False) -> Cancellation:
        """Keep FileResults; see `Pages.store`. Raises ForkError no_space when Redis takes no more."""
        self._remember(parts)
        with _no_space():
            return self.results.pages.store(self.fork_id, parts, only=anew)

    def keep_all_pages(self, pages: list[bytes]) -> Cancellation:
        """Keep FileResults; see `Pages.store_all`. Raises ForkError no_space when Redis takes no more."""
        self._remember({ALL_PAGES: pages})
        with _no_space():
            return self.results.pages.store_all(self.fork_id, pages)

    def _remember(self, pages: Pages) -> None:
        if are_few(pages):  # many are not to stay in memory
            self.pages.update(pages)

    def store_result(self, result: ForkResult) -> None:
        """Keep the final result, and put a line into the worker's log."""
        if result["error"] is None and self.note is not None:
            self.note(result, self.pages)
        self.results.final.store(result["fork_id"], result)
        ends = f"{result['source']!r} -> {result['destination']!r}"  # escaped: names come from guests
        error = result["error"]
        if error is None:
            entries, seconds = result["files"]["total"], result["seconds"]["total"]
            log.info("fork %s succeeded: %s, %d entries in %.3f s", self.fork_id, ends, entries, seconds)
        else:
            log.warning("fork %s %s: %s: %r", self.fork_id, result["status"], ends, describe(error))


@contextmanager
def _no_space() -> Iterator[None]:
    try:
        yield
    except ResponseError as error:
        message = f"Redis does not take the results of the files: {cause(error)}"
        raise ForkError(Code.NO_SPACE, message, "") from None
