"""Small forks that wait in the queue, made one after the other by a process that has just made one.

A scheduler that starts many machines at once sends many requests for small forks. Celery takes several milliseconds for
each message, and such a fork one. So a pool process that has made a fork takes the requests that wait with one command,
claims their ids with another one, and makes them for a short time, its turn. Then it returns to its worker, which gives
it what is next: a single fork, or a part of a campaign or of a large fork.

A fork can take longer than expected. A thread then returns the requests that have not begun to the queue, for processes
that are idle, and renews the lease of the one that runs. It is stopped together with its process (SIGSTOP), so another
worker then takes that request too.

A request that is not plain (a time limit, callbacks, a second delivery) goes the ordinary way, through Celery. So does
one whose fork another process holds. If the process dies, its worker returns what it had taken; see
`tasks.delivery.message.Message`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import NamedTuple

from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from tasks.context import Context
from tasks.contract.raw_request import text_of
from tasks.copier.kernel.processes import open_files_limit
from tasks.delivery.outcome import RetryLater
from tasks.delivery.queue_of_forks import QueueOfForks, Taken
from tasks.fork.start import run_claimed
from tasks.store.campaign.fork_ids import campaign_of_fork
from tasks.store.claims import Claim, ClaimOutcome
from tasks.store.redis_errors import cause

log = logging.getLogger(__name__)

#: How long a process makes waiting forks before it returns to its worker, in seconds. A batch of a campaign takes about
#: as long, so both get half of the process.
TURN_SECONDS = 0.2
#: How many requests are taken at once, and how many forks may be complete before they are ended together. With more,
#: more of them wait behind one that takes long, and are returned.
_MOST = 8
#: Below this RLIMIT_NOFILE, the staging of only one fork is kept open.
_LOW_LIMIT = 256
#: A fork that takes longer, in seconds, keeps no other request waiting; and how often that is checked.
_LONG_SECONDS = 0.05
_CHECK_SECONDS = 0.02
#: Seconds between two renewals of the leases.
_RENEWAL_SECONDS = 1.0


class Accepted(NamedTuple):
    """A plain request for one fork."""

    job_id: str
    request: object
    #: How long it waited, in seconds.
    queued: float


#: Validates a message of a queue. Returns None for one that is to go the ordinary way.
Accept = Callable[[bytes, str], Accepted | None]


class _Waiting(NamedTuple):
    """A request whose id this process has claimed."""

    message: Taken
    accepted: Accepted
    claimed: ClaimOutcome


def make_waiting_forks(context: Context, queue: QueueOfForks, tag: str, accept: Accept) -> None:
    """Make forks that wait in `queue`, for one turn. The delivery tags of their messages begin with `tag`.

    Each request either ends, or is returned to the queue. After an error it goes the ordinary way, which reports it.
    """
    most = 1 if open_files_limit() < _LOW_LIMIT else _MOST
    turn = _Turn(replace(context, canvas=None, ended={}, most_complete=most), queue, accept)
    try:
        turn.run(tag)
    except Exception as error:
        log.warning("the requests that wait are left to the worker: %s: %s", type(error).__name__, cause(error))


class _Turn:
    """The requests that this process has taken. A second thread calls `check`."""

    def __init__(self, context: Context, queue: QueueOfForks, accept: Accept) -> None:
        self._context, self._queue, self._accept = context, queue, accept
        #: The forks that are complete, and the delivery tags of those that were made and not acknowledged.
        self._complete = context.complete_forks
        self._done: list[str] = []
        self._lock = threading.Lock()
        #: Those that have not begun; the one that runs, since when, and whether its state is STARTED.
        self._waiting: deque[_Waiting] = deque()
        self._running: _Waiting | None = None
        self._began = 0.0
        self._is_announced = False
        self._renewed = time.monotonic()

    def run(self, tag: str) -> None:
        """Make forks until the turn is over or none waits. Raises RedisError, and what a fork raises."""
        end = time.monotonic() + TURN_SECONDS
        while time.monotonic() < end:
            taken = self._queue.take(_MOST, tag)
            if not taken:
                return
            try:
                self._waiting.extend(self._claim(taken))
                with _watch.watching(self):
                    self._make_all(end)
            except BaseException:
                with suppress(RedisError, OSError):  # those that are not acknowledged
                    self._queue.give_back(taken, "ordinary")
                raise

    def _claim(self, taken: list[Taken]) -> Iterator[_Waiting]:
        """The requests whose ids are free; the others go the ordinary way."""
        found: dict[str, tuple[Taken, Accepted]] = {}
        odd: list[Taken] = []
        for message in taken:
            accepted = self._accept(message.text, self._queue.name)
            if accepted is None or accepted.job_id in found or campaign_of_fork(self._context.results, accepted.job_id):
                odd.append(message)
            else:
                found[accepted.job_id] = message, accepted
        claims = {job_id: self._claim_of(accepted) for job_id, (_, accepted) in found.items()}
        outcomes = self._context.results.claims.take_all(claims, started=False) if claims else []
        for (message, accepted), claimed in zip(found.values(), outcomes, strict=True):
            if claimed.is_new and claimed.final_state is None:
                yield _Waiting(message, accepted, claimed)
            else:
                odd.append(message)
        self._queue.give_back(odd, "ordinary")

    def _claim_of(self, accepted: Accepted) -> Claim:
        destination = text_of(accepted.request, "destination")
        return {"request": accepted.request, "destination": destination, "queue": self._context.queue}

    def _make_all(self, end: float) -> None:
        try:
            while time.monotonic() < end and (request := self._begin_next()) is not None:
                if self._make(request):
                    self._done.append(request.message.tag)
        finally:
            with self._lock:
                self._running = None
            self._end_done(self._complete.end)
            self._give_back_waiting()

    def _begin_next(self) -> _Waiting | None:
        with self._lock:
            self._running = self._waiting.popleft() if self._waiting else None
            self._began, self._is_announced = time.monotonic(), False
            return self._running

    def _make(self, request: _Waiting) -> bool:
        """Make one fork. Returns False if its request was returned to the queue."""
        job_id, body, queued = request.accepted
        try:
            result = run_claimed(self._context, job_id, body, queued, request.claimed)
        except RetryLater:
            self._queue.give_back([request.message], "ordinary")
            return False
        if result is not None and not self._complete.has_taken(job_id):  # or other tasks continue the fork
            ended = self._context.ended.get(job_id)
            self._context.results.states.publish_final(job_id, ended.result if ended is not None else result)
        return True

    def _end_done(self, store: Callable[[], None]) -> None:
        """Store the ends of the forks that were made, and then acknowledge their requests. Raises RedisError."""
        with self._lock:
            done, self._done = self._done, []
        try:
            store()
            self._queue.acknowledge(done)
        except BaseException:
            with self._lock:
                self._done = done + self._done
            raise

    def _give_back_waiting(self) -> None:
        with self._lock:  # also while they are returned: the other thread would take those that came after them
            waiting = [request.message for request in self._waiting]
            self._waiting.clear()
            self._queue.give_back(waiting)

    # -- in the second thread

    def check(self) -> None:
        """Return the requests that wait behind a long fork, end those that are made, and renew the leases.

        Errors of Redis are ignored. A message that could not be returned is delivered again when its lease has ended.
        """
        now = time.monotonic()
        with self._lock:
            running, is_long = self._running, now - self._began > _LONG_SECONDS
            announce = is_long and not self._is_announced
            self._is_announced = self._is_announced or is_long
            tags = [request.message.tag for request in self._waiting]
        if running is None:
            return
        with suppress(RedisError, OperationalError, OSError):
            if is_long:
                self._give_back_waiting()
                self._end_done(self._complete.try_to_end)
            if announce:
                replace(self._context.results, patient=False).states.publish_started(running.accepted.job_id)
            if now - self._renewed > _RENEWAL_SECONDS:
                self._renewed = now
                self._queue.renew([running.message.tag, *tags])


class _Watch:
    """The second thread of a process: it checks the turn, while there is one."""

    def __init__(self) -> None:
        self._turn: _Turn | None = None
        self._has_turn = threading.Event()
        self._has_thread = False

    @contextmanager
    def watching(self, turn: _Turn) -> Iterator[None]:
        """Check `turn` within the context."""
        if not self._has_thread:
            threading.Thread(target=self._run, name="waiting-forks", daemon=True).start()
            self._has_thread = True
        self._turn = turn
        self._has_turn.set()
        try:
            yield
        finally:
            self._turn = None
            self._has_turn.clear()

    def _run(self) -> None:
        while self._has_turn.wait():
            time.sleep(_CHECK_SECONDS)
            turn = self._turn
            if turn is not None:
                turn.check()


#: Made when it is first used, in a pool process: a thread does not survive a fork(2).
_watch = _Watch()
