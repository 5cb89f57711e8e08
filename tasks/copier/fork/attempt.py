"""One attempt at a fork in one process, and the ledger that keeps what it did."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from tasks.copier.endpoints import Endpoints
from tasks.copier.errors import from_record
from tasks.copier.fork_spec import Clock, ForkResult, ForkSpec
from tasks.copier.progress import Cancellation, Ticker
from tasks.copier.report import Report, Totals
from tasks.copier.staging.journal import Journal
from tasks.copier.staging.staging import Staging


class Ledger(Protocol):
    """Where the results of a fork are kept for its client."""

    def keep_pages(self, pages_by_part: dict[str, list[bytes]], *, replace_all: bool = False) -> Cancellation:
        """Keep the FileResults of parts of the fork: a chunk's number, `plan` or `close`. Raises ForkError.

        `replace_all`: replace all that an earlier attempt kept. Returns whether cancellation was requested.
        """

    def keep_all_pages(self, pages: list[bytes]) -> Cancellation:
        """As `keep_pages`, for a fork that is not divided into parts. Replaces all that was kept before."""

    def lost_parts(self, parts: Iterable[str]) -> list[str]:
        """Those of `parts`, which were kept, whose FileResults are not there any more."""

    def store_result(self, result: ForkResult) -> None:
        """Keep the final result. When this returns, a second delivery of the request finds it."""


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

    def pages(self) -> list[bytes]:
        """The FileResults of a fork whose parts do not keep their own."""
        return Report.pages_of(self.reports.values())

    def keep_pages(self, undone: Iterable[str] = ()) -> Cancellation:
        """Keep the FileResults that are not in the ledger yet; `undone` parts get empty pages. Raises ForkError.

        Returns whether cancellation of the fork was requested.
        """
        if not self.in_parts:
            return self.ledger.keep_all_pages(self.pages())
        pages: dict[str, list[bytes]] = {part: [] for part in undone}
        pages |= {part: report.close() for part, report in self.reports.items() if report.has_pages()}
        return self.ledger.keep_pages(pages)
