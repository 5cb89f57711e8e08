"""What a running task works with: the worker's roots and limits, the results in Redis, a way to send further tasks."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Protocol

from redis.exceptions import RedisError

from tasks.complete_forks import CompleteForks
from tasks.copier.copy_rate import Pace, unbounded
from tasks.copier.errors import cancelled
from tasks.copier.fork_spec import ForkResult, ForkSpec
from tasks.copier.options import Limits
from tasks.copier.progress import POLL_SECONDS, Poll, Progress
from tasks.copier.roots import Roots
from tasks.fork_ledger import ForkLedger
from tasks.store.final_results import Ended
from tasks.store.recent_forks.forks import RecentForks
from tasks.store.results import Results


class Canvas(Protocol):
    """The tasks that a client wants sent after its job; see `tasks.delivery.canvas`."""

    def keep(self, results: Results, job_id: str) -> None:
        """Keep them until the job has ended."""


class Send(Protocol):
    """Sends a task to the inner queue of the domain that the running task came from."""

    def __call__(self, task: str, kwargs: dict[str, Any], task_id: str) -> None:
        """`task` is one of the names in `tasks.names`."""


@dataclass(frozen=True)
class Context:
    """What one running task works with."""

    roots: Roots
    limits: Limits
    results: Results
    send: Send
    #: The queue of the domain, as clients name it.
    queue: str
    #: The tasks that the client wants sent after this task's job, if there are any.
    canvas: Canvas | None = None
    #: Notes on this host about forks whose results Redis may have lost.
    recent_forks: RecentForks = field(default_factory=RecentForks)
    #: The jobs whose end this task has stored.
    ended: dict[str, Ended[ForkResult]] = field(default_factory=dict)
    #: The copy rate of this host.
    pace: Pace = unbounded
    #: How many small forks may be complete before they are ended together.
    most_complete: int = 1

    @cached_property
    def complete_forks(self) -> CompleteForks:
        """The small forks whose trees this task has completed."""
        return CompleteForks(self.results, self.most_complete)

    def keep_canvas(self, job_id: str) -> None:
        """Keep the tasks that follow the job for the task that ends it. Call this once the request holds the id."""
        if self.canvas is not None:
            self.canvas.keep(self.results, job_id)

    def ledger(self, spec: ForkSpec, parent_fd: int, name: str) -> ForkLedger:
        """The ledger of a fork that will be published as `name` in `parent_fd`."""
        note = partial(self.recent_forks.note_fork, spec, parent_fd, name)
        return ForkLedger(self.results, spec.fork_id, self.ended, note)

    def plain_ledger(self, fork_id: str) -> ForkLedger:
        """The ledger of a fork that has published nothing, or whose note exists."""
        return ForkLedger(self.results, fork_id, self.ended)

    def poll_of(self, fork_id: str, part: str, destination: str) -> Poll:
        """A function that publishes the progress of one part of a fork, and raises ForkError cancelled on request.

        It ignores errors of Redis: neither progress nor cancellation is worth a failed fork.
        """
        publish_from = time.monotonic() + POLL_SECONDS  # a part that is done earlier publishes nothing
        results = replace(self.results, patient=False)

        def poll(progress: Progress) -> None:
            if time.monotonic() >= publish_from:
                self.publish_progress(fork_id, part, progress)
            with suppress(RedisError):
                if results.cancellations.is_requested(fork_id):
                    raise cancelled(destination)

        return poll

    def publish_progress(self, fork_id: str, part: str, progress: Progress) -> None:
        """Publish what one part of a fork has done so far. Errors of Redis are ignored."""
        with suppress(RedisError):
            replace(self.results, patient=False).states.publish_progress(fork_id, part, progress)
