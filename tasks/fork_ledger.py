"""Where the end of a fork is kept: in Redis, in a note on this host, in the log, and in the metrics."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from redis.exceptions import OutOfMemoryError, ResponseError

from tasks import events
from tasks.copier.errors import Code, ForkError
from tasks.copier.fork_spec import ForkResult
from tasks.copier.progress import Cancellation
from tasks.fork_summary import log_end
from tasks.store.final_results import Ended
from tasks.store.recent_forks.forks import ALL_PAGES, Pages, are_few
from tasks.store.redis_errors import cause, is_passing
from tasks.store.results import Results

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ForkLedger:
    """The engine's ledger of one fork (see `tasks.copier.fork.lifecycle.Ledger`), kept in Redis."""

    results: Results
    fork_id: str
    #: See `Context.ended`.
    ended: dict[str, Ended[ForkResult]]
    #: Writes a note about the fork when it has succeeded; see `tasks.store.recent_forks`.
    note: Callable[[ForkResult, Pages], None] | None = None
    #: The FileResults that this process has kept, by part.
    pages: Pages = field(default_factory=dict)

    def keep_pages(self, pages_by_part: dict[str, list[bytes]], *, replace_all: bool = False) -> Cancellation:
        """Keep FileResults; see `Pages.store`. Raises ForkError if Redis refuses them: no_space if it is full."""
        self.remember(pages_by_part)
        with _refusal_as_fork_error():
            return self.results.pages.store(self.fork_id, pages_by_part, replace_all=replace_all)

    def keep_all_pages(self, pages: list[bytes]) -> Cancellation:
        """Keep FileResults; see `Pages.store_all`. Raises ForkError if Redis refuses them: no_space if it is full."""
        self.remember({ALL_PAGES: pages})
        with _refusal_as_fork_error():
            return self.results.pages.store_all({self.fork_id: pages})[0]

    def lost_parts(self, parts: Iterable[str]) -> list[str]:
        """Those of `parts`, which were kept, whose FileResults Redis has lost."""
        return self.results.pages.missing(self.fork_id, parts)

    def remember(self, pages: Pages) -> None:
        """Remember FileResults that are stored, for the note."""
        if are_few(pages):  # more of them would take too much memory
            self.pages.update(pages)

    def store_result(self, result: ForkResult) -> None:
        """Store the final result, and log it. A result that another process has stored stays: see `ended`."""
        self.report_end(result)
        self.note_end(result, self.results.final.store(self.fork_id, result))

    def report_end(self, result: ForkResult) -> None:
        """Report the end of the fork, before it is stored."""
        if result["error"] is None and self.note is not None:
            self.note(result, self.pages)
        events.forks_ended(self.fork_id, [result], of_campaign=False)

    def note_end(self, result: ForkResult, ended: Ended[ForkResult]) -> None:
        """Note the end of the fork, which is stored, and log it."""
        self.ended[self.fork_id] = ended
        if ended.result != result:
            log.warning("fork %s has ended before, in another process; its earlier result stays", self.fork_id)
            return
        log_end(result)


@contextmanager
def _refusal_as_fork_error() -> Iterator[None]:
    try:
        yield
    except ResponseError as error:
        raise refused_pages(error) from None


def refused_pages(error: ResponseError) -> ForkError:
    """The error of a fork whose FileResults Redis refused. Raises `error` itself if it is temporary."""
    if is_passing(error):
        raise error
    code = Code.NO_SPACE if isinstance(error, OutOfMemoryError) else Code.IO_ERROR
    return ForkError(code, f"Redis refused the results of the files: {cause(error)}", "")
