"""Small forks that one process ends together, so that each step takes one round trip to Redis for all of them."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import cast

from redis.exceptions import ResponseError

from tasks.copier.errors import ForkError
from tasks.copier.fork.completion import CompleteFork, Superseded
from tasks.copier.fork_spec import ForkResult
from tasks.copier.progress import Cancellation
from tasks.fork_ledger import ForkLedger, refused_pages
from tasks.store.final_results import Ended
from tasks.store.recent_forks.forks import ALL_PAGES
from tasks.store.results import Results


@dataclass
class _Held:
    """A small fork that this process ends together with others."""

    fork: CompleteFork
    ledger: ForkLedger
    #: Closes its staging and its endpoints.
    opened: ExitStack
    #: Its result, once it is published.
    result: ForkResult | None = None


class CompleteForks:
    """Small forks whose trees are complete, and which this process ends together.

    Their FileResults are stored, and the same round trip to Redis returns which of them were cancelled or have ended in
    another process. The others are published. Then one command stores all results, their staging is removed, and one
    command publishes all states.

    Until then it holds their staging. If the process dies, the next delivery of their messages publishes them, or makes
    them again. Other threads may call `try_to_end`.
    """

    def __init__(self, results: Results, most: int = 1) -> None:
        """The forks are ended as soon as there are `most`."""
        self._results, self._most = results, most
        self._lock = threading.Lock()
        self._held: list[_Held] = []
        #: The ends that are stored, and whose states are not published, by the fork's id.
        self._stored: dict[str, Ended[ForkResult]] = {}
        self._added: set[str] = set()

    def has_taken(self, fork_id: str) -> bool:
        """Whether this fork was ended here, with its state, or will be."""
        return fork_id in self._added

    def add(self, fork: CompleteFork, ledger: ForkLedger, opened: ExitStack) -> None:
        """Add a fork, whose staging is held by `opened`. Raises RedisError as `end` does."""
        with self._lock:
            self._added.add(ledger.fork_id)
            self._held.append(_Held(fork, ledger, opened))
            is_full = len(self._held) >= self._most
        if is_full:
            self.end()

    def end(self) -> None:
        """End all forks. Raises RedisError: what is left is then done by the next delivery of their messages."""
        with self._lock:
            try:
                self._end(self._results)
            finally:
                for held in self._held:
                    held.opened.close()
                self._held.clear()

    def try_to_end(self) -> None:
        """As `end`, but does not wait while Redis is away or full. What is left is kept. Raises RedisError."""
        with self._lock:
            self._end(replace(self._results, patient=False))

    def _end(self, results: Results) -> None:
        new = [held for held in self._held if held.result is None]
        if new:
            self._publish(results, new)
        if self._held:
            self._store_results(results)
        if self._stored:
            states = {fork_id: end.result for fork_id, end in self._stored.items()}
            ended = {fork_id for fork_id, end in self._stored.items() if end.has_followers is False}
            results.states.publish_all_final(states, ended)
            self._stored = {}

    def _publish(self, results: Results, new: list[_Held]) -> None:
        """Store the FileResults of forks and publish them, unless they were cancelled or have ended meanwhile."""
        pages = {held.ledger.fork_id: held.fork.pages() for held in new}
        for held, answer in zip(new, _store_pages(results, pages), strict=True):
            held.ledger.remember({ALL_PAGES: pages[held.ledger.fork_id]})
            try:
                result = held.fork.publish(answer)
            except Superseded:  # another process stores its result
                self._release(held)
                continue
            if result["error"] is None:
                held.result = result
                held.ledger.report_end(result)
            else:  # its failure is stored
                self._stored[held.ledger.fork_id] = held.ledger.ended[held.ledger.fork_id]
                self._release(held)

    def _store_results(self, results: Results) -> None:
        """Store the results, and remove the staging: a client may look for it as soon as it sees the state."""
        published = {held.ledger.fork_id: cast(ForkResult, held.result) for held in self._held}
        ends = results.final.store_all(published) if published else []
        for held, end in zip([*self._held], ends, strict=True):
            held.ledger.note_end(published[held.ledger.fork_id], end)
            held.fork.remove_staging()
            self._stored[held.ledger.fork_id] = end
            self._release(held)

    def _release(self, held: _Held) -> None:
        self._held.remove(held)
        held.opened.close()


def _store_pages(results: Results, pages: Mapping[str, list[bytes]]) -> list[Cancellation | ForkError]:
    """Store the FileResults of some forks: whether each is to be given up, or the error with which it fails."""
    try:
        return [*results.pages.store_all(pages)]
    except ResponseError as error:
        if len(pages) > 1:  # which of them Redis refused is not known
            return [answer for fork_id, its in pages.items() for answer in _store_pages(results, {fork_id: its})]
        return [refused_pages(error)]
