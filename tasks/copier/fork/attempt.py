"""One attempt at a fork in one process, and the ledger that keeps what it did."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, Protocol

from tasks.copier.endpoints import Endpoints
from tasks.copier.errors import ForkError, from_record
from tasks.copier.fork_spec import Clock, ForkResult, ForkSpec
from tasks.copier.progress import Cancellation, Ticker
from tasks.copier.report import Report, Totals
from tasks.copier.space.reservation import job_of, withdraw
from tasks.copier.staging.journal import Journal
from tasks.copier.staging.staging import Staging

#: How often a removal is tried: a call that failed once may succeed the next time.
_REMOVE_TRIES = 3


class Ledger(Protocol):
    """Where the results of a fork are kept for its client."""

    def keep_pages(self, pages_by_part: dict[str, list[bytes]], *, replace_all: bool = False) -> Cancellation:
        """Keep the FileResults of parts of the fork: a chunk's number, `plan` or `close`. Raises ForkError.

        `replace_all`: replace all that an earlier attempt kept. Returns whether cancellation was requested.
        """

    def keep_all_pages(self, pages: list[bytes]) -> Cancellation:
        """As `keep_pages`, for a fork that is not divided into parts. Replaces all that was kept before."""

    def store_result(self, result: ForkResult) -> None:
        """Keep the final result. When this returns, a second delivery of the request finds it."""


class Published(NamedTuple):
    """A small fork that is published, and whose result is not stored. Its staging is still held."""

    result: ForkResult
    #: Removes its staging. To be called when the result is stored; raises no error.
    remove_staging: Callable[[], None]


#: Takes a small fork that is published, and stores its result at once or a moment later.
TakeEnd = Callable[[Published], None]


@dataclass
class Attempt:
    """One attempt at a fork in this process, and what its result will need, whether it succeeds or fails."""

    ends: Endpoints
    staging: Staging
    ticker: Ticker
    ledger: Ledger
    spec: ForkSpec
    clock: Clock
    journal: Journal | None = None
    chunks: int = 0
    #: Whether each part keeps its own FileResults, because a task of its own does it.
    in_parts: bool = False
    #: Whether this process alone has made the fork, in its first attempt: its staging has only a lock and a journal,
    #: and no bytes are reserved for it.
    alone: bool = False
    #: Stores the result of a fork that this process alone has made, in place of the ledger.
    take_end: TakeEnd | None = None
    reports: dict[str, Report] = field(default_factory=dict)

    def parts(self) -> list[str]:
        """The parts whose FileResults may be in the ledger."""
        plan = self.journal.plan if self.journal is not None else None
        chunks = self.chunks if plan is None else len(plan["chunks"])
        return ["plan", "close", *map(str, range(chunks))]

    def totals(self) -> Totals:
        """The sums over all parts."""
        totals = Totals()
        for report in self.reports.values():
            totals.add(report.totals)
        return totals

    def raise_failure(self) -> None:
        """Raise the ForkError of the first part that failed."""
        for report in self.reports.values():
            if report.totals.error is not None:
                raise from_record(report.totals.error)

    def keep_pages(self, undone: Iterable[str] = ()) -> Cancellation:
        """Keep the FileResults that are not in the ledger yet; `undone` parts get empty pages. Raises ForkError.

        Returns whether cancellation of the fork was requested.
        """
        if not self.in_parts:
            return self.ledger.keep_all_pages(Report.pages_of(self.reports.values()))
        pages: dict[str, list[bytes]] = {part: [] for part in undone}
        pages |= {part: report.close() for part, report in self.reports.items() if report.has_pages()}
        return self.ledger.keep_pages(pages)


def withdraw_reservation(staging: Staging) -> None:
    """Give back the bytes that the fork has reserved. A control directory that is gone (FUSE, NFS) has no name."""
    with suppress(OSError):
        withdraw(job_of(staging.fd))


def remove_staging(attempt: Attempt) -> None:
    """Remove the staging of a published fork whose result is stored."""
    if not attempt.alone:
        withdraw_reservation(attempt.staging)
    try_to_remove(partial(attempt.staging.remove, alone=attempt.alone))


def try_to_remove(remove: Callable[[], None]) -> None:
    """Remove what an ended fork leaves. What cannot be removed in a few tries is removed by `gc` later."""
    for _ in range(_REMOVE_TRIES):
        with suppress(OSError, ForkError):
            remove()
            return
