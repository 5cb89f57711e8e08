"""The worker's main process: a message that one of its children works on, and its end if that child is lost."""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from typing import Any, cast

from billiard.einfo import ExceptionInfo
from billiard.exceptions import TimeLimitExceeded, WorkerLostError
from celery import Celery
from celery.exceptions import Ignore, Reject, Retry
from celery.utils.functional import maybe_list
from celery.worker import state
from celery.worker.request import Request
from celery.worker.state import task_ready
from kombu.exceptions import OperationalError
from redis.exceptions import OutOfMemoryError, RedisError, ResponseError

from tasks import events
from tasks.contract import ForkFailed
from tasks.contract.raw_request import text_of
from tasks.copier.errors import Code, ForkError, describe
from tasks.copier.fork.chunk import MAX_TRIES
from tasks.delivery.backend import results_of
from tasks.delivery.queue_of_forks import queue_of_message
from tasks.delivery.sending import send_once
from tasks.names import domain_of, inner_queue, job_fields
from tasks.store.redis_errors import cause, is_passing
from tasks.store.results import Results

log = logging.getLogger(__name__)

#: The job of a message is abandoned after so many lost processes. The staging counts the tries of planning, cloning
#: and closing and ends a fork earlier; this limit is for processes that die before they can count.
MAX_LOSSES = 3 * MAX_TRIES
#: Exceptions with which a task ends intentionally. Any other one is a fault.
_INTENDED = (ForkFailed, Ignore, Reject, Retry)


class Message(Request):
    """A message with the time at which the worker received it, and with this program's rules for its end.

    Celery ends a task when it is revoked, terminated, expired or out of time. A fork is more than one task and must
    leave nothing behind, so this class always passes the message to a child process. The child ends the fork through
    its cancellation flag.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.request_dict["received_at"] = time.time()
        # The contract, not the client, decides which tasks store a result.
        self.request_dict["ignore_result"] = self.task.ignore_result
        self._client_limit = self._limit_of_client()
        self.time_limits = (self._client_limit, None)
        if self._client_limit is None and not self._publishes_events():
            self.request_dict["tag_for_others"] = self.message.delivery_tag

    def _is_from_client(self) -> bool:
        """Whether a client sent the message, and not this program itself."""
        return "#" not in str(self.delivery_info["routing_key"])

    def _publishes_events(self) -> bool:
        """Whether the worker publishes events of tasks (`-E`). It publishes them of the messages that it takes."""
        eventer = self.eventer
        return bool(eventer and eventer.enabled and (not eventer.groups or "task" in eventer.groups))

    @property
    def job_id(self) -> str:
        """The id of the fork or campaign that the message belongs to."""
        return text_of(self.kwargs, "fork_id") or text_of(self.kwargs, "campaign_id") or str(self.id)

    @property
    def log_fields(self) -> dict[str, str]:
        """The fields of log lines about the message."""
        return job_fields(str(self.name), str(self.id))

    def results(self) -> Results:
        """The results in Redis. Nothing waits for a Redis that is away: the main process has other messages."""
        return results_of(cast(Celery, self.app), patient=False)

    def send_end(self, task: str, arguments: dict[str, Any], job_id: str) -> None:
        """Send a task that ends a job, once. Raises RedisError, OperationalError."""
        queue = inner_queue(domain_of(str(self.delivery_info["routing_key"])), task)
        send_once(cast(Celery, self.app), task, arguments, job_id, queue)

    # -- Celery's own ways to end a task

    def _limit_of_client(self) -> float | None:
        """The time limit that the client set for the message, in seconds; None if only the worker's limit counts.

        It counts for the first delivery only: a later one needs its time to end the fork. Messages of this program
        carry the limit of the process that sent them (`Celery.send_task`), which no client asked for.
        """
        if not self._is_from_client() or self.request_dict.get("redelivered"):
            return None
        limits = [limit for limit in self.time_limits if limit and limit > 0]
        own = self.task.time_limit
        return min(limits) if limits and (own is None or min(limits) < own) else None

    def is_revoked(self) -> bool:
        """Whether a client revoked it, by its id or by one of its stamps (Celery's remote control)."""
        return self.id in state.revoked or any(
            value in (maybe_list(state.revoked_stamps.get(name)) or ())
            for name, values in self.stamps.items()
            for value in maybe_list(values) or ()
        )

    def revoked(self) -> bool:
        """False, always: the child cancels a revoked job, and it also checks whether the message has expired."""
        if self._is_from_client() and self.is_revoked():  # the others come again and again while the job is held
            self._request_cancellation("it was revoked")
        return False

    def terminate(self, pool: Any, signal: Any = None) -> None:
        """Request the job's cancellation. The child polls for it and is not killed."""
        self._request_cancellation("it was terminated")

    def on_timeout(self, soft: bool, timeout: float) -> None:
        """Request the job's cancellation if the limit was its client's; `on_failure` does the rest.

        The worker's own limit is for a process that hangs: another process then does the task again.
        """
        log.error(
            "%s[%s] took more than %s s; its process is killed", self.name, self.id, timeout, extra=self.log_fields
        )
        if self._client_limit is not None:
            self._request_cancellation(f"it took more than its client's limit of {timeout} s")

    def _request_cancellation(self, why: str) -> None:
        log.warning("%s[%s]: cancellation requested: %s", self.name, self.id, why, extra=self.log_fields)
        try:
            self.results().cancellations.request(self.job_id)
        except (RedisError, OperationalError, OSError) as error:
            log.warning(
                "%s[%s]: Redis did not accept the cancellation: %s",
                self.name,
                self.id,
                cause(error),
                extra=self.log_fields,
            )

    # -- failures

    def on_failure(self, exc_info: Any, *args: Any, **kwargs: Any) -> Any:
        """Celery's own handling for a failed job. Any other failure is one of the process or of Redis.

        If Redis refused something, the message goes back to its queue. It also goes back if the process was lost;
        after `MAX_LOSSES` lost processes, the job is abandoned.
        """
        error = getattr(exc_info.exception, "exc", exc_info.exception)  # billiard's ExceptionWithTraceback around it
        if isinstance(error, OutOfMemoryError) or is_passing(error):
            task_ready(self)
            log.warning("%s[%s] goes back to its queue: %s", self.name, self.id, cause(error), extra=self.log_fields)
            events.happened("redelivery", "redis")
            return self.reject(requeue=True)
        if not isinstance(error, _INTENDED) and not state.should_terminate:
            exc_info = self._lost(error)
        return super().on_failure(exc_info, *args, **kwargs)

    def _lost(self, error: BaseException) -> Any:
        """The failure that Celery sees for a lost process: WorkerLostError, or Ignore if the job was abandoned."""
        late = isinstance(error, TimeLimitExceeded)
        with suppress(RedisError, OSError):  # then they are delivered again when their leases have ended
            self._give_back_others()
        reason = "it took too long" if late else f"{type(error).__name__}: {cause(error)}"
        with suppress(RedisError, OperationalError, OSError):  # then it is tried once more
            losses = self.results().open_jobs.count_loss(str(self.id))
            if losses >= 2 * MAX_LOSSES and isinstance(error, ResponseError):
                self._end_without_result(error)
                return _info(Ignore())
            if losses >= MAX_LOSSES:
                log.error("%s[%s] failed %d times; its job is abandoned: %s", self.name, self.id, losses, reason)
                self.abandon(self.job_id, self._destination())
                return _info(Ignore())
        log.warning("%s[%s] is delivered again: %s", self.name, self.id, reason, extra=self.log_fields)
        events.happened("redelivery", "time_limit" if late else "process_lost")
        return _info(error if isinstance(error, WorkerLostError) else WorkerLostError(reason))

    def _end_without_result(self, error: ResponseError) -> None:
        """Fail a job whose end Redis refuses to store each time: its client would wait without end."""
        message = f"Redis refused to store how it ended, so what is at the destination is unknown: {cause(error)}"
        record = ForkError(Code.IO_ERROR, message, self._destination()).record()
        log.error("%s[%s] ends without a result: %s", self.name, self.id, describe(record), extra=self.log_fields)
        states = self.results().states
        states.publish_all_final({self.job_id: {"status": "failed", "error": record}}, ended=(self.job_id,))

    def _give_back_others(self) -> None:
        """Return the further messages that the lost process had taken; see `tasks.fork.waiting_forks`."""
        tag = self.request_dict.get("tag_for_others")
        if tag is None:
            return
        with queue_of_message(self.message) as queue:
            count = queue.give_back_of(tag)
        if count:
            log.warning("%d messages that a lost process had taken go back to their queue", count)

    def _success_was_stored(self) -> bool:
        """False, always. Celery 5.7 would acknowledge the message; its redelivery removes what the process left."""
        return False

    def abandon(self, job_id: str, destination: str) -> None:
        """Send the task that ends the job without trying it again. Raises RedisError, OperationalError."""
        raise NotImplementedError

    def _destination(self) -> str:
        request = self.kwargs.get("request", next(iter(self.args), None))
        return text_of(self.kwargs, "destination") or text_of(request, "destination")


def task_options(message: type[Message]) -> dict[str, Any]:
    """The Celery options of a task whose messages are of the class `message`."""
    return {
        "bind": True,
        "shared": False,  # or every other Celery app of the process would get the tasks too
        "Request": message,
        "throws": (ForkFailed,),
        "resultrepr_maxsize": 1,  # Celery's log line for a success would repeat the whole result
    }


def _info(error: Exception) -> ExceptionInfo:
    """An error in the form that Celery's callbacks take."""
    try:
        raise error
    except Exception:
        return ExceptionInfo()
