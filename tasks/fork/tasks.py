"""The Celery tasks of a fork: a few lines each over the functions that do the work."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

from celery import Celery
from celery.exceptions import Ignore

from tasks.context import Context
from tasks.contract import ForkFailed
from tasks.contract.raw_request import text_of
from tasks.copier.errors import Code, ForkError, describe
from tasks.copier.estimate.estimate import Estimate
from tasks.copier.fork_spec import ForkResult
from tasks.delivery.canvas import Job
from tasks.delivery.message import Message, task_options
from tasks.delivery.outcome import end_task, with_retries
from tasks.delivery.queue_of_forks import queue_of_forks
from tasks.delivery.task_request import (
    AnyTask,
    is_expired,
    job_id,
    request_argument,
    seconds_queued,
    tag_for_others,
)
from tasks.fork.abandon import run_abandon
from tasks.fork.chunk import run_chunk
from tasks.fork.estimate import run_estimate
from tasks.fork.finish import run_finish
from tasks.fork.start import run_fork
from tasks.fork.takeover import take_over
from tasks.fork.waiting_forks import Accept, make_waiting_forks
from tasks.names import ABANDON_TASK, CHUNK_TASK, ESTIMATE_TASK, FINISH_TASK, FORK_TASK, SWEEP_TASK
from tasks.sweep import run_sweep


class ForkMessage(Message):
    """A message of a fork. If too many processes die of it, the fork is abandoned."""

    def abandon(self, job_id: str, destination: str) -> None:
        """Send the task that ends the fork. Raises RedisError, OperationalError."""
        self.send_end(ABANDON_TASK, {"destination": destination}, job_id)


def register_forks(app: Celery, context_of: Callable[[AnyTask], Context], accept: Accept) -> None:
    """Give `app` the tasks of forks. `context_of` makes the context of a running task; `accept` validates messages."""
    part = task_options(ForkMessage) | {"ignore_result": True}
    job = task_options(ForkMessage) | {"base": Job}

    @app.task(name=FORK_TASK, **job)
    def fork(self: AnyTask, *args: Any, **kwargs: Any) -> ForkResult:
        """One fork: an entry of the contract. Its one argument is `request`."""
        context, request = context_of(self), request_argument(args, kwargs)
        queued, expired = seconds_queued(self), is_expired(self)
        run = partial(run_fork, context, job_id(self), request, queued, expired=expired)
        result = _run(self, context, {"request": request}, text_of(request, "destination"), run)
        _make_waiting_forks(self, context, accept)
        return end_task(self, context, result)

    @app.task(name=ESTIMATE_TASK, **job)
    def estimate(self: AnyTask, *args: Any, **kwargs: Any) -> Estimate:
        """What a fork would do and cost: an entry of the contract. Its one argument is `request`."""
        context, request, task_id = context_of(self), request_argument(args, kwargs), job_id(self)
        context.keep_canvas(task_id)
        try:
            found = run_estimate(context, task_id, request, expired=is_expired(self))
        except ForkError as error:
            if error.code is not Code.CANCELLED:
                raise ForkFailed(describe(error.record())) from None
            cast(Job, self).end_as_revoked(task_id, describe(error.record()))
            found = None
        if found is None:
            raise Ignore
        return found

    @app.task(name=CHUNK_TASK, **part)
    def chunk(self: AnyTask, fork_id: str, destination: str, number: int) -> None:
        """One chunk of a fork."""
        context, arguments = context_of(self), {"fork_id": fork_id, "destination": destination, "number": number}
        run = partial(run_chunk, context, fork_id, destination, number)
        with_retries(self, context, arguments, run, partial(take_over, context, fork_id, destination))

    @app.task(name=FINISH_TASK, **job)
    def finish(self: AnyTask, destination: str) -> ForkResult:
        """The end of a fork. It has the fork's own id, so its final state is the fork's."""
        context = context_of(self)
        run = partial(run_finish, context, job_id(self), destination)
        return _end(self, context, {"destination": destination}, destination, run)

    @app.task(name=ABANDON_TASK, **job)
    def abandon(self: AnyTask, destination: str) -> ForkResult:
        """The end of a fork whose messages killed their processes. It has the fork's own id, as `finish` does."""
        context = context_of(self)
        run = partial(run_abandon, context, job_id(self), destination)
        return _end(self, context, {"destination": destination}, destination, run)

    @app.task(name=SWEEP_TASK, **part)
    def sweep(self: AnyTask, every: int) -> None:
        """Checks the jobs that have not ended; see `tasks.sweep`."""
        run_sweep(context_of(self), every)


def _make_waiting_forks(task: AnyTask, context: Context, accept: Accept) -> None:
    """Make small forks that wait, if this task has made one. Its own state is stored first: its client waits."""
    tag, ended = tag_for_others(task), context.ended.get(job_id(task))
    if tag is None or ended is None or ended.has_followers is not False or ended.result["error"] is not None:
        return
    if not context.complete_forks.has_taken(job_id(task)):
        cast(Job, task).publish_success(job_id(task), ended.result)
    cast(Job, task).request.ignore_result = True  # Celery does not store the state again
    make_waiting_forks(context, queue_of_forks(task.app, context.queue), tag, accept)


def _end(
    task: AnyTask,
    context: Context,
    arguments: dict[str, Any],
    destination: str,
    run: Callable[[], ForkResult | None],
) -> ForkResult:
    """Run a task that has the fork's own id, and end it in the fork's final state."""
    return end_task(task, context, _run(task, context, arguments, destination, run))


def _run(
    task: AnyTask,
    context: Context,
    arguments: dict[str, Any],
    destination: str,
    run: Callable[[], ForkResult | None],
) -> ForkResult | None:
    return with_retries(task, context, arguments, run, partial(take_over, context, job_id(task), destination))
