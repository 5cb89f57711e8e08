"""The Celery tasks: a few lines each over the functions that do the work."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, cast

from celery import Celery, Task, states
from celery.backends.redis import RedisBackend
from celery.exceptions import Ignore, TaskRevokedError
from kombu.utils.encoding import bytes_to_str

from tasks.bury import run_bury
from tasks.chunk import run_chunk
from tasks.context import (
    AGAIN_SECONDS,
    BURY_TASK,
    CHUNK_TASK,
    FINISH_TASK,
    FORK_TASK,
    GONE,
    SWEEP_TASK,
    Again,
    Context,
)
from tasks.contract import ForkFailed, text_of
from tasks.copier.errors import describe
from tasks.copier.options import Limits
from tasks.copier.roots import Roots
from tasks.copier.spec import ForkResult
from tasks.finish import run_finish
from tasks.fork import run_fork
from tasks.message import Message
from tasks.results import Results
from tasks.sweep import run_sweep
from tasks.takeover import STALE_SECONDS, settle_lost, settle_published, take_over

#: Queues beside the one that clients use: a finish must not wait behind chunks, nor a new fork behind either. What
#: this program sends again of a fork goes past all that no worker has begun; a sweep goes behind all chunks.
_INNER_QUEUES = {
    CHUNK_TASK: "#chunk",
    FINISH_TASK: "#finish",
    FORK_TASK: "#finish",
    BURY_TASK: "#finish",
    SWEEP_TASK: "#chunk",
}

AnyTask = Task[Any, Any]


def inner_queue(queue: str, task: str) -> str:
    """Where this program itself sends a task in the domain whose own queue is `queue`."""
    return queue + _INNER_QUEUES[task]


def inner_queues(queue: str) -> list[str]:
    """The queues that a worker of the domain queue `queue` consumes beside it."""
    return sorted({inner_queue(queue, task) for task in _INNER_QUEUES})


def results_of(app: Celery, expires: int, *, patient: bool) -> Results:
    """The results in the app's result backend."""
    backend = cast(RedisBackend, app.backend)
    return Results(backend.client, expires, lambda fork_id: bytes_to_str(backend.get_key_for_task(fork_id)), patient)


def register(app: Celery, roots: Roots, limits: Limits, expires: int) -> None:
    """Give `app` the tasks. `expires` is the TTL of results in seconds."""

    def context(task: AnyTask) -> Context:
        queue = _queue(task)

        def send(task: str, kwargs: dict[str, Any], task_id: str) -> None:
            app.send_task(task, kwargs=kwargs, task_id=task_id, queue=inner_queue(queue, task))

        return Context(roots, limits, results_of(app, expires, patient=True), send, queue)

    class CountedMessage(Message):
        """A message whose losses are counted in Redis, since whoever takes it dies."""

        def count_loss(self) -> int:
            return results_of(app, expires, patient=False).count_loss(str(self.id))

        def bury(self, fork_id: str, destination: str) -> None:
            queue = inner_queue(str(self.delivery_info["routing_key"]).partition("#")[0], BURY_TASK)
            app.send_task(BURY_TASK, kwargs={"destination": destination}, task_id=fork_id, queue=queue, retry=False)

    # resultrepr_maxsize: Celery's log line for a success would repeat the whole result.
    common: dict[str, Any] = {
        "bind": True,
        "Request": CountedMessage,
        "throws": (ForkFailed,),
        "resultrepr_maxsize": 1,
    }

    @app.task(name=FORK_TASK, **common)
    def fork(self: AnyTask, *args: Any, **kwargs: Any) -> ForkResult:
        """One fork; the contract's entry. Its one argument is `request`; anything else is no request."""
        given = [*args, *kwargs.values()]
        request = given[0] if len(given) == 1 and set(kwargs) <= {"request"} else None
        try:
            return _answer(self, run_fork(context(self), _id(self), request, _queued(self)))
        except Again as again:
            destination = text_of(request, "destination")
            return _wait(self, context(self), _id(self), destination, again, {"request": request})

    @app.task(name=CHUNK_TASK, ignore_result=True, **common)
    def chunk(self: AnyTask, fork_id: str, destination: str, number: int) -> None:
        """One chunk of a fork."""
        try:
            run_chunk(context(self), fork_id, destination, number)
        except Again as again:
            kwargs = {"fork_id": fork_id, "destination": destination, "number": number}
            _wait(self, context(self), fork_id, destination, again, kwargs)

    @app.task(name=FINISH_TASK, **common)
    def finish(self: AnyTask, destination: str) -> ForkResult:
        """The end of a fork; runs under the fork's own id, so that its outcome is the fork's."""
        try:
            return _answer(self, run_finish(context(self), _id(self), destination))
        except Again as again:
            return _wait(self, context(self), _id(self), destination, again, {"destination": destination})

    @app.task(name=BURY_TASK, **common)
    def bury(self: AnyTask, destination: str) -> ForkResult:
        """The end of a fork of which a message killed whoever took it; runs under the fork's own id."""
        try:
            return _answer(self, run_bury(context(self), _id(self), destination))
        except Again as again:
            return _wait(self, context(self), _id(self), destination, again, {"destination": destination})

    @app.task(name=SWEEP_TASK, ignore_result=True, **common)
    def sweep(self: AnyTask, every: int) -> None:
        """A look at the forks that have no end yet; see `tasks.sweep`."""
        run_sweep(context(self), every)


def _wait(
    task: AnyTask, context: Context, fork_id: str, destination: str, again: Again, kwargs: dict[str, Any]
) -> ForkResult:
    """Go back to the queue, under the same id and without a trace; or, when the holder seems paused, take the fork."""
    pulse, since = getattr(task.request, "seen", None) or (again.pulse, time.time())
    if pulse != again.pulse:
        since = time.time()
    if time.time() - since > STALE_SECONDS:
        request = take_over(context, fork_id, destination, again.pulse)
        if request is not None:
            context.send(FORK_TASK, {"request": request}, fork_id)
            raise Ignore
        if again.pulse == GONE:
            return _answer(task, settle_lost(context, fork_id, destination))
        if settle_published(context, fork_id, destination):
            context.send(FINISH_TASK, {"destination": destination}, fork_id)  # which stores it as the fork's state
            raise Ignore
    queue, headers = inner_queue(context.queue, task.name), {"seen": [again.pulse, since]}
    task.app.send_task(
        task.name, kwargs=kwargs, task_id=_id(task), queue=queue, headers=headers, countdown=AGAIN_SECONDS
    )
    raise Ignore


def _answer(task: AnyTask, result: ForkResult | None) -> ForkResult:
    """End the task as its fork ended; without a result, as if it had not run."""
    if result is None:
        raise Ignore
    error = result["error"]
    if error is None:
        return result
    if result["status"] == "cancelled":
        task.backend.store_result(_id(task), TaskRevokedError(describe(error)), states.REVOKED)
        raise Ignore
    raise ForkFailed(describe(error))


def _id(task: AnyTask) -> str:
    return str(task.request.id)


def _queue(task: AnyTask) -> str:
    """The domain's queue, out of the one that the message came from."""
    delivery: Mapping[str, Any] = task.request.delivery_info or {}
    return str(delivery["routing_key"]).partition("#")[0]


def _queued(task: AnyTask) -> float:
    """Seconds that the message waited: since its header `sent_at`, or else since the worker took it."""
    sent, received = getattr(task.request, "sent_at", None), getattr(task.request, "received_at", None)
    began = sent if isinstance(sent, int | float) else received
    return max(0.0, time.time() - began) if began is not None else 0.0
