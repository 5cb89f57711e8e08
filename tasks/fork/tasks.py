"""The Celery tasks: a few lines each over the functions that do the work."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, NoReturn, cast

from celery import Celery, Task
from celery.exceptions import Ignore
from redis.exceptions import OutOfMemoryError

from tasks.context import RETRY_SECONDS, Context, RetryLater
from tasks.contract import ForkFailed
from tasks.contract.fork_request import text_of
from tasks.copier.errors import describe
from tasks.copier.fork_spec import ForkResult
from tasks.copier.options import Limits
from tasks.copier.roots import Roots
from tasks.delivery.backend import results_of
from tasks.delivery.cancel import cancel_job
from tasks.delivery.canvas import Job, take_canvas
from tasks.delivery.message import Message
from tasks.fork.abandon import run_abandon
from tasks.fork.chunk import run_chunk
from tasks.fork.finish import run_finish
from tasks.fork.start import run_fork
from tasks.fork.takeover import STALE_SECONDS, store_lost, store_published, take_over
from tasks.names import ABANDON_TASK, CHUNK_TASK, FINISH_TASK, FORK_TASK, SWEEP_TASK, inner_queue
from tasks.store.recent_forks.forks import RecentForks
from tasks.store.redis_errors import wait_out
from tasks.sweep import run_sweep

AnyTask = Task[Any, Any]
#: See `seen_of`.
Seen = tuple[int, float]
#: The heartbeat in the header `seen` if no staging directory exists. Wire format: earlier versions compare it too, and
#: with another value the time would start again each time that the message changes between two versions.
NO_STAGING = 0


def surroundings(app: Celery, roots: Roots, limits: Limits) -> Callable[[AnyTask], Context]:
    """What gives each running task its context."""
    ended = RecentForks()  # one for all tasks of a process: it remembers when it purged, and whether it warned

    def context(task: AnyTask) -> Context:
        queue = _queue(task)

        def send(task: str, kwargs: dict[str, Any], task_id: str) -> None:
            send_patiently(app, task, kwargs, task_id, inner_queue(queue, task))

        return Context(roots, limits, results_of(app, patient=True), send, queue, take_canvas(task.request), ended)

    return context


def send_patiently(app: Celery, task: str, kwargs: dict[str, Any], task_id: str, queue: str, **options: Any) -> None:
    """Send a task; waits while Redis is away, refuses writes, or is full."""
    wait_out(lambda: app.send_task(task, kwargs=kwargs, task_id=task_id, queue=queue, **options), OutOfMemoryError)


def options_of(message: type[Message]) -> dict[str, Any]:
    """The options of a task whose messages are of the class `message`."""
    # resultrepr_maxsize: Celery's log line for a success would repeat the whole result.
    # shared: else every other Celery app of the process would get the tasks too.
    return {"bind": True, "shared": False, "Request": message, "throws": (ForkFailed,), "resultrepr_maxsize": 1}


def domain_queue(message: Message) -> str:
    """The domain's queue, out of the one that a message came from."""
    return str(message.delivery_info["routing_key"]).partition("#")[0]


def register(app: Celery, context: Callable[[AnyTask], Context]) -> None:
    """Give `app` the tasks of forks; `context` is what `surroundings` gave."""

    class ForkMessage(Message):
        """A message whose losses are counted in Redis, since whoever takes it dies."""

        def count_loss(self) -> int:
            return results_of(app, patient=False).open_jobs.count_loss(str(self.id))

        def abandon(self, job_id: str, destination: str) -> None:
            queue = inner_queue(domain_queue(self), ABANDON_TASK)
            app.send_task(ABANDON_TASK, kwargs={"destination": destination}, task_id=job_id, queue=queue, retry=False)

        def cancel_job(self) -> None:
            cancel_job(app, results_of(app, patient=False), self.job_id)

    common = options_of(ForkMessage)
    job = common | {"base": Job}

    @app.task(name=FORK_TASK, **job)
    def fork(self: AnyTask, *args: Any, **kwargs: Any) -> ForkResult:
        """One fork; the contract's entry. Its one argument is `request`; anything else is no request."""
        request = given_request(args, kwargs)
        try:
            return _answer(self, run_fork(context(self), job_id(self), request, queued(self), expired=is_expired(self)))
        except RetryLater as again:
            destination = text_of(request, "destination")
            return _wait(self, context(self), job_id(self), destination, again, {"request": request})

    @app.task(name=CHUNK_TASK, ignore_result=True, **common)
    def chunk(self: AnyTask, fork_id: str, destination: str, number: int) -> None:
        """One chunk of a fork."""
        try:
            run_chunk(context(self), fork_id, destination, number)
        except RetryLater as again:
            kwargs = {"fork_id": fork_id, "destination": destination, "number": number}
            _wait(self, context(self), fork_id, destination, again, kwargs)

    @app.task(name=FINISH_TASK, **job)
    def finish(self: AnyTask, destination: str) -> ForkResult:
        """The end of a fork; runs under the fork's own id, so that its outcome is the fork's."""
        try:
            return _answer(self, run_finish(context(self), job_id(self), destination))
        except RetryLater as again:
            return _wait(self, context(self), job_id(self), destination, again, {"destination": destination})

    @app.task(name=ABANDON_TASK, **job)
    def abandon(self: AnyTask, destination: str) -> ForkResult:
        """The end of a fork of which a message killed whoever took it; runs under the fork's own id."""
        try:
            return _answer(self, run_abandon(context(self), job_id(self), destination))
        except RetryLater as again:
            return _wait(self, context(self), job_id(self), destination, again, {"destination": destination})

    @app.task(name=SWEEP_TASK, ignore_result=True, **common)
    def sweep(self: AnyTask, every: int) -> None:
        """A look at the forks that have no end yet; see `tasks.sweep`."""
        run_sweep(context(self), every)


def _wait(
    task: AnyTask, context: Context, fork_id: str, destination: str, again: RetryLater, kwargs: dict[str, Any]
) -> ForkResult:
    """Go back to the queue, under the same id and without a trace; or, when the holder seems paused, take the fork."""
    seen = seen_of(task, again)
    if is_stale(seen):
        request = take_over(context, fork_id, destination, again.heartbeat)
        if request is not None:
            context.send(FORK_TASK, {"request": request}, fork_id)
            raise Ignore
        if again.heartbeat is None:
            return _answer(task, store_lost(context, fork_id, destination))
        if store_published(context, fork_id, destination):
            context.send(FINISH_TASK, {"destination": destination}, fork_id)  # which stores it as the fork's state
            raise Ignore
    go_back(task, context, seen, kwargs)


def seen_of(task: AnyTask, again: RetryLater) -> Seen:
    """The holder's last sign of life, and since when it gave none but this (seconds since the epoch)."""
    heartbeat = NO_STAGING if again.heartbeat is None else again.heartbeat
    last, since = getattr(task.request, "seen", None) or (heartbeat, time.time())
    return (last, since) if last == heartbeat else (heartbeat, time.time())


def is_stale(seen: Seen) -> bool:
    """Whether the holder is to be taken for paused."""
    return time.time() - seen[1] > STALE_SECONDS


def go_back(task: AnyTask, context: Context, seen: Seen, kwargs: dict[str, Any]) -> NoReturn:
    """Send the task to its queue again, under the same id, and end this run of it without a trace."""
    queue, headers = inner_queue(context.queue, task.name), {"seen": list(seen)}
    send_patiently(task.app, task.name, kwargs, job_id(task), queue, headers=headers, countdown=RETRY_SECONDS)
    raise Ignore


def given_request(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The one argument of a task of the contract, `request`; anything else is no request: None."""
    given = [*args, *kwargs.values()]
    return given[0] if len(given) == 1 and set(kwargs) <= {"request"} else None


def _answer(task: AnyTask, result: ForkResult | None) -> ForkResult:
    """End the task as its fork ended; without a result, as if it had not run."""
    if result is None:
        raise Ignore
    error = result["error"]
    if error is None:
        return result
    if result["status"] == "cancelled":
        cast(Job, task).end_as_revoked(job_id(task), describe(error))
        raise Ignore
    raise ForkFailed(describe(error))


def job_id(task: AnyTask) -> str:
    """The task's id, which is the job's in the tasks that end one."""
    return str(task.request.id)


def _queue(task: AnyTask) -> str:
    """The domain's queue, out of the one that the message came from."""
    delivery: Mapping[str, Any] = task.request.delivery_info or {}
    return str(delivery["routing_key"]).partition("#")[0]


def is_expired(task: AnyTask) -> bool:
    """Whether the time has passed until which the client wanted the job to be begun (its message's `expires`)."""
    expires: Any = task.request.expires
    if expires is None:
        return False
    moment = datetime.fromisoformat(expires)
    return datetime.now(UTC) > (moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC))


def queued(task: AnyTask) -> float:
    """Seconds that the message waited: since its header `sent_at`, or else since the worker took it."""
    sent, received = getattr(task.request, "sent_at", None), getattr(task.request, "received_at", None)
    began = sent if isinstance(sent, int | float) else received
    return max(0.0, time.time() - began) if began is not None else 0.0
