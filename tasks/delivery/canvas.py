"""The tasks that a client wants sent after its job (Celery's canvas: link, link_error, chain, chord).

A fork in chunks and a campaign are ended by other tasks than the one that the client sent, and the worker may send that
one again. So these tasks are kept in Redis under the job's id as soon as the id is claimed. The task that stores the
final state sends them. The key is `tasks.store.keys.CANVAS`, a hash: digest -> the tasks as JSON, or nothing once they
were sent.

**How often.** At least once: the task that ends a job sends the tasks that follow, one process at a time, and then
notes that. If its process dies in between, its message is delivered again and sends them again. A callback without an
id from its client has the same id each time. A message that is delivered again, or sent again by its client, has the
same digest and sends nothing more.

**Errors.** A task that cannot be sent (a wrong queue, arguments that cannot be encoded) is logged and changes no state.
While Redis is away, sending waits.

**A cancelled job** has, as in Celery, no callbacks and no errbacks. Its chord fails, and the rest of its chain is
REVOKED too, so that no client waits for it.
"""

from __future__ import annotations

import hashlib
import logging
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

from celery import Celery, Task, signature, states
from celery.app.task import Context as Request
from celery.exceptions import TaskRevokedError
from kombu.exceptions import OperationalError
from kombu.utils.json import dumps, loads
from redis.exceptions import OutOfMemoryError, ResponseError

from tasks.contract import ForkFailed
from tasks.delivery.backend import results_of
from tasks.delivery.signatures import FOLLOWERS, followers_of
from tasks.store import keys
from tasks.store.redis_errors import is_passing, wait_out
from tasks.store.results import Results

log = logging.getLogger(__name__)

#: The longest canvas that is kept, in characters of JSON.
LONGEST_CANVAS = 1 << 20
#: The most different canvases of one id. A client that sends its job again sends the same one.
_MOST = 16
#: Pause between two tries to send what follows a job, in seconds.
_PAUSE_SECONDS = 0.02
#: How kombu retries on another connection. This module waits for Redis itself, since kombu also retries errors that do
#: not pass (WRONGTYPE).
_RETRIES = {"max_retries": 2, "interval_start": 0, "interval_step": 0.1, "interval_max": 0.2}
#: The headers that say where a message is in its client's workflow.
_PLACE = ("group", "group_index", "root_id", "parent_id")
#: The queue of tasks that are not this program's and name no queue: Celery's default, which clients' workers serve.
CLIENTS_QUEUE = "celery"


@dataclass(frozen=True)
class Canvas:
    """The tasks that follow a job, and the job's place in its client's workflow, as JSON."""

    text: str

    @property
    def digest(self) -> str:
        """Distinguishes it from the canvases of other messages with the same id."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:32]

    def keep(self, results: Results, job_id: str) -> None:
        """Keep it for the task that ends the job. A canvas that was sent already is not sent again."""
        key = keys.CANVAS.of(job_id)

        def write() -> None:
            known = cast("list[bytes]", results.redis.hkeys(key))
            if len(known) >= _MOST and self.digest.encode() not in known:
                log.warning(
                    "job %r has %d different canvases already; the tasks of a further one are not sent",
                    job_id,
                    len(known),
                )
                return
            with results.redis.pipeline(transaction=True) as pipe:
                pipe.hsetnx(key, self.digest, self.text)
                pipe.expire(key, results.open_expires)  # as long as the claim
                pipe.execute()

        results.ask(write, OutOfMemoryError)


def take_canvas(request: Any) -> Canvas | None:
    """Take the tasks that follow a job out of its task's request. Celery would send them before the job has ended."""
    options = {name: getattr(request, name, None) for name in FOLLOWERS}
    for name in FOLLOWERS:
        setattr(request, name, None)
    followers = followers_of(options)
    if not followers:
        return None
    place = {name: getattr(request, name, None) for name in _PLACE}
    return Canvas(dumps(followers | {"place": place}, sort_keys=True))


class Job(Task):  # type: ignore[type-arg]  # Celery's class takes no arguments at run time
    """A task that can end a job. The tasks that follow the job are sent once its final state is stored."""

    abstract = True

    def on_success(self, retval: Any, task_id: str, *_: Any) -> None:
        """Called after Celery has stored SUCCESS."""
        self.follow(task_id, states.SUCCESS, retval)

    def on_failure(self, exc: Exception, task_id: str, *_: Any) -> None:
        """Called after a task failed. Only with ForkFailed has the job ended, and Celery stored FAILURE."""
        if isinstance(exc, ForkFailed):
            self.follow(task_id, states.FAILURE, exc)

    def publish_success(self, task_id: str, result: Any) -> None:
        """Store SUCCESS before the task ends."""
        self.backend.mark_as_done(task_id, result, self.request)

    def end_as_revoked(self, task_id: str, reason: str) -> None:
        """Store the end of a cancelled job."""
        error = TaskRevokedError(reason)
        self.backend.store_result(task_id, error, states.REVOKED)
        self.follow(task_id, states.REVOKED, error)

    def follow(self, job_id: str, state: str, outcome: Any) -> None:
        """Send the tasks that follow a job whose final state is stored."""
        if not getattr(self.request, "has_followers", True):
            return
        results = results_of(self.app, patient=True)
        key = keys.CANVAS.of(job_id)
        with _sending(results, job_id):
            kept = cast("dict[bytes, bytes]", results.ask(lambda: results.redis.hgetall(key)))
            for digest, text in kept.items():
                if text:
                    _Following(self.app, job_id, digest.decode(), loads(text)).send(state, outcome)
                    results.ask(lambda digest=digest: results.redis.hset(key, digest, b""), OutOfMemoryError)  # type: ignore[misc]


@contextmanager
def _sending(results: Results, job_id: str) -> Iterator[None]:
    """Send alone what follows a job. Two tasks may end it at the same moment.

    If the process that sends is killed or paused, another one waits `SENDING_SECONDS`, and then sends it too.
    """
    key = keys.SENDING.of(job_id)
    while not results.ask(lambda: results.redis.set(key, b"1", nx=True, ex=keys.SENDING_SECONDS), OutOfMemoryError):
        time.sleep(_PAUSE_SECONDS)
    try:
        yield
    finally:
        results.ask(lambda: results.redis.delete(key))


@dataclass(frozen=True)
class _Following:
    """The tasks that follow one message of a job that has ended."""

    app: Celery
    job_id: str
    digest: str
    canvas: Mapping[str, Any]

    def send(self, state: str, outcome: Any) -> None:
        place = self.canvas["place"]
        related = {"parent_id": self.job_id, "root_id": place["root_id"] or self.job_id}
        if state == states.SUCCESS:
            for number, callback in enumerate(self.canvas.get("callbacks", [])):
                self._apply("callback", number, callback, outcome, related)
            chain = self.canvas.get("chain")
            if chain:  # Celery keeps a chain in reverse order
                self._apply("chain", 0, chain[-1], outcome, related | {"chain": chain[:-1]})
        elif state == states.FAILURE:
            for number, errback in enumerate(self.canvas.get("errbacks", [])):
                self._apply("errback", number, errback, self.job_id, related)
        self._answer_workflow(state, outcome, place)

    def _apply(self, kind: str, number: int, given: Any, argument: Any, related: dict[str, Any]) -> None:
        def send() -> None:
            callback = signature(given, app=self.app)
            if callback.subtask_type is None and "task_id" not in callback.options:
                callback.options["task_id"] = str(uuid.uuid5(uuid.NAMESPACE_OID, f"{self.digest} {kind} {number}"))
            try:
                callback.apply_async((argument,), retry_policy=_RETRIES, **related)
            except OperationalError as error:  # kombu's, around what Redis answered
                raise error.__cause__ if isinstance(error.__cause__, ResponseError) else error from None

        self._try(f"the {kind} {given['task']!r}", send)

    def _answer_workflow(self, state: str, outcome: Any, place: Mapping[str, Any]) -> None:
        """Count the job in its chord. If the job did not succeed, end the chord and the rest of the chain likewise."""
        chord, backend = self.canvas.get("chord"), self.app.backend
        request = Request(
            {**place, "id": self.job_id, "task": "forkvm", "chord": chord, "delivery_info": {}, "errbacks": None}
        )
        if state == states.SUCCESS:
            if chord:
                self._try("its part of a chord", lambda: backend.on_chord_part_return(request, state, outcome))
            return
        request.chain = self.canvas.get("chain")
        fail: Callable[..., None] = backend.mark_as_failure

        def end() -> None:
            fail(self.job_id, outcome, request=request, store_result=True, call_errbacks=False, state=state)

        if chord or request.chain:
            self._try("the end of its chord or chain", end)

    def _try(self, what: str, send: Callable[[], object]) -> None:
        try:
            wait_out(send, OutOfMemoryError)
        except Exception as error:  # a client can write anything into a signature
            if is_passing(error):
                raise
            log.warning("%s of %r could not be sent: %s", what, self.job_id, type(error).__name__)


def route(name: str, *_: Any, **__: Any) -> dict[str, str] | None:
    """Celery's router for tasks that name no queue."""
    return None if name.startswith("forkvm.") else {"queue": CLIENTS_QUEUE}
