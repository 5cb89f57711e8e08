"""How a task ends: the one translation of exceptions into outcomes, used by the tasks of forks and of campaigns.

    Held, RetryLater        The message goes back to its queue and comes again after `RETRY_SECONDS`. If the process
                            that holds the staging gives no heartbeat for `STALE_SECONDS`, the job is taken from it.
    Superseded              Another process has taken the job and stores its result. This run of the task stores none.
    ForkError, OSError      The job fails. The task decides what to store and to remove.
    ResponseError           The same, if Redis refuses a command for a reason that does not pass, such as WRONGTYPE.

Any other exception is a fault of the process or of Redis; see `tasks.delivery.message.Message.on_failure`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple, NoReturn, TypeVar, cast

from celery import states
from celery.exceptions import Ignore
from redis.exceptions import OutOfMemoryError, ResponseError

from tasks import events
from tasks.context import Context
from tasks.contract import ForkFailed
from tasks.copier.campaign.spec import CampaignResult
from tasks.copier.errors import Code, ForkError, describe
from tasks.copier.fork.completion import Superseded
from tasks.copier.fork_spec import ForkResult
from tasks.copier.roots import Parent, Roots
from tasks.copier.staging.control_directory import Held
from tasks.delivery.canvas import Job
from tasks.delivery.sending import send_patiently
from tasks.delivery.task_request import AnyTask, job_id, trace_headers
from tasks.names import inner_queue
from tasks.store.job_states import final_state
from tasks.store.redis_errors import cause, is_passing

T = TypeVar("T")
Result = TypeVar("Result", ForkResult, CampaignResult)

#: How long a message that went back to its queue waits there, in seconds.
RETRY_SECONDS = 1.0
#: A holder without a heartbeat for so long, in seconds, is taken for paused: it has missed five heartbeats.
STALE_SECONDS = 10.0
#: The heartbeat in the header `seen` if no staging directory exists. Wire format: earlier versions compare it too, and
#: with another value the time would start again each time that the message changes between two versions.
NO_STAGING = 0


class RetryLater(Exception):
    """Another process holds what this task needs, so its message goes back to the queue.

    `heartbeat` is the holder's (see `ControlDirectory.heartbeat`), or None if there is no staging directory.
    """

    def __init__(self, heartbeat: int | None) -> None:
        super().__init__(heartbeat)
        self.heartbeat = heartbeat


class Holder(NamedTuple):
    """The last heartbeat of the process that holds a job, and since when it has not changed (seconds since the epoch).

    This is the header `seen` of a message that goes back to its queue.
    """

    heartbeat: int
    since: float

    def is_stale(self) -> bool:
        """Whether the holder is taken for paused."""
        return time.time() - self.since > STALE_SECONDS


def outcome_of(work: Callable[[], T], fail: Callable[[ForkError | OSError], T]) -> T | None:
    """The result of `work`, or of `fail` if it fails; None if another process has taken the job.

    Raises RetryLater while another process holds the staging.
    """
    try:
        return work()
    except Held as held:
        raise RetryLater(held.heartbeat) from None
    except Superseded:
        return None
    except (ForkError, OSError) as error:
        return fail(error)
    except ResponseError as error:
        if is_passing(error) or isinstance(error, OutOfMemoryError):
            raise
        return fail(ForkError(Code.IO_ERROR, f"Redis refused a command: {cause(error)}"))


def open_parent_or_retry(roots: Roots, destination: str) -> Parent:
    """As `Roots.open_parent`. Raises RetryLater if the directory cannot be opened: it may be back a moment later."""
    try:
        return roots.open_parent(destination)
    except ForkError:
        raise RetryLater(None) from None


def with_retries(
    task: AnyTask,
    context: Context,
    arguments: dict[str, Any],
    run: Callable[[], T | None],
    take_over: Callable[[int | None], T | None],
) -> T | None:
    """The result of `run`. While it raises RetryLater, the message goes back to its queue with the same `arguments`.

    Once the holder is stale, `take_over` is called with its last heartbeat. It returns the job's result, or None if
    other tasks continue the job; it raises RetryLater if the message is to go back to its queue nevertheless.
    """
    try:
        return run()
    except RetryLater as retry:
        heartbeat, holder = retry.heartbeat, holder_of(task, retry)
    if holder.is_stale():
        with suppress(RetryLater):
            result = take_over(heartbeat)
            if result is None:
                raise Ignore
            return result
    _send_back(task, context, arguments, holder)


def end_task(task: AnyTask, context: Context, result: Result | None) -> Result:
    """End a task in the final state of its job: return its result, store REVOKED, or raise ForkFailed.

    Without a result, the task ends without any state (Celery's Ignore).
    """
    if result is None:
        raise Ignore
    if (ended := context.ended.get(job_id(task))) is not None:
        result = cast(Result, ended.result)  # type: ignore[redundant-cast]  # not for campaigns
        cast(Any, task.request).has_followers = ended.has_followers is not False
    error, state = result["error"], final_state(result)
    if error is None or state == states.SUCCESS:
        return result
    if state == states.REVOKED:
        cast(Job, task).end_as_revoked(job_id(task), describe(error))
        raise Ignore
    raise ForkFailed(describe(error))


def holder_of(task: AnyTask, retry: RetryLater) -> Holder:
    """The holder that a task has to wait for, as this run of it and its earlier runs have observed it."""
    heartbeat = NO_STAGING if retry.heartbeat is None else retry.heartbeat
    seen = getattr(task.request, "seen", None)
    return Holder(*seen) if seen and seen[0] == heartbeat else Holder(heartbeat, time.time())


def _send_back(task: AnyTask, context: Context, arguments: dict[str, Any], holder: Holder) -> NoReturn:
    """Send the task to its queue again under the same id, and end this run of it without any state."""
    events.happened("retry", "not_found" if holder.heartbeat == NO_STAGING else "held")
    queue, headers = inner_queue(context.queue, task.name), {"seen": list(holder), **trace_headers(task)}
    send_patiently(task.app, task.name, arguments, job_id(task), queue, headers=headers, countdown=RETRY_SECONDS)
    raise Ignore
