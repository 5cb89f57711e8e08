"""Where the end of a fork is kept: in Redis, in a note on this host, in the log, and in the metrics."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from redis.exceptions import ResponseError

from tasks import events
from tasks.copier.errors import Code, ForkError
from tasks.copier.fork.attempt import Published
from tasks.copier.fork_spec import ForkResult
from tasks.copier.progress import Cancellation
from tasks.fork_summary import log_end
from tasks.store.final_results import Ended
from tasks.store.recent_forks.forks import ALL_PAGES, Pages, are_few
from tasks.store.redis_errors import cause
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
        """Keep FileResults; see `Pages.store`. Raises ForkError no_space if Redis refuses them."""
        self._remember(pages_by_part)
        with _redis_full_as_no_space():
            return self.results.pages.store(self.fork_id, pages_by_part, replace_all=replace_all)

    def keep_all_pages(self, pages: list[bytes]) -> Cancellation:
        """Keep FileResults; see `Pages.store_all`. Raises ForkError no_space if Redis refuses them."""
        self._remember({ALL_PAGES: pages})
        with _redis_full_as_no_space():
            return self.results.pages.store_all(self.fork_id, pages)

    def _remember(self, pages: Pages) -> None:
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
def _redis_full_as_no_space() -> Iterator[None]:
    try:
        yield
    except ResponseError as error:
        message = f"Redis refused the results of the files: {cause(error)}"
        raise ForkError(Code.NO_SPACE, message, "") from None


class _Held(NamedTuple):
    fork: Published
    ledger: ForkLedger
    #: Closes its staging and its endpoints.
    opened: ExitStack


class PublishedForks:
    """Small forks that this process has published, and whose ends it stores together: results, and then states.

    Until then it holds their staging, whose journal says that they are published. If it dies, the next delivery of
    their messages stores their ends. Other threads may call `try_to_store`.
    """

    def __init__(self, results: Results, most: int = 1) -> None:
        """Ends are stored as soon as there are `most`."""
        self._results, self._most = results, most
        self._lock = threading.Lock()
        self._held: list[_Held] = []
        #: The ends that are stored, and whose states are not published, by the fork's id.
        self._stored: dict[str, Ended[ForkResult]] = {}
        self._added: set[str] = set()

    def has_taken(self, fork_id: str) -> bool:
        """Whether the end of this fork was stored here, with its state, or will be."""
        return fork_id in self._added

    def add(self, fork: Published, ledger: ForkLedger, opened: ExitStack) -> None:
        """Add a fork, whose staging is held by `opened`. Raises RedisError as `store` does."""
        ledger.report_end(fork.result)
        with self._lock:
            self._added.add(ledger.fork_id)
            self._held.append(_Held(fork, ledger, opened))
            is_full = len(self._held) >= self._most
        if is_full:
            self.store()

    def store(self) -> None:
        """Store the ends of all forks, and remove their staging.

        Raises RedisError. The staging then stays for the next delivery of their messages.
        """
        with self._lock:
            try:
                self._store(self._results)
            finally:
                for held in self._held:
                    held.opened.close()
                self._held.clear()

    def try_to_store(self) -> None:
        """As `store`, but does not wait while Redis is away or full. What is not stored is kept. Raises RedisError."""
        with self._lock:
            self._store(replace(self._results, patient=False))

    def _store(self, results: Results) -> None:
        if self._held:
            self._store_results(results)
        if self._stored:
            states = {fork_id: end.result for fork_id, end in self._stored.items()}
            ended = {fork_id for fork_id, end in self._stored.items() if end.has_followers is False}
            results.states.publish_all_final(states, ended)
            self._stored = {}

    def _store_results(self, results: Results) -> None:
        """Store the results, and remove the staging: a client may look for it as soon as it sees the state."""
        ends = results.final.store_all({held.ledger.fork_id: held.fork.result for held in self._held})
        held_forks, self._held = self._held, []
        for held, end in zip(held_forks, ends, strict=True):
            with held.opened:
                held.ledger.note_end(held.fork.result, end)
                held.fork.remove_staging()
            self._stored[held.ledger.fork_id] = end
