"""What a worker's main process knows of a message that one of its children works on."""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from typing import Any

from billiard.einfo import ExceptionInfo
from billiard.exceptions import TimeLimitExceeded, WorkerLostError
from celery.exceptions import Ignore, Reject, Retry
from celery.utils.functional import maybe_list
from celery.worker import state
from celery.worker.request import Request
from celery.worker.state import task_ready
from kombu.exceptions import OperationalError
from redis.exceptions import OutOfMemoryError, RedisError

from tasks.contract import ForkFailed
from tasks.contract.fork_request import text_of
from tasks.copier.fork.chunk import MAX_TRIES
from tasks.store.redis_errors import cause, is_passing

log = logging.getLogger(__name__)

#: So many processes may die of one message; then nothing of its fork is tried any more. What dies while it plans,
#: clones or closes is counted in the staging and ends before that. This is for what dies before it can count.
MAX_LOSSES = 3 * MAX_TRIES
#: What a task ends with by intention; anything else is a fault.
_ENDS = (ForkFailed, Ignore, Reject, Retry)


class Message(Request):
    """A message that knows when it was taken from the queue, which Redis does not tell, and who died of it.

    Celery's own ends of a task (revoked, terminated, expired, out of time) are none of a fork: a fork is more than one
    task, and must leave nothing. So the message always goes to a child, which ends its fork by the cancellation flag.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.request_dict["received_at"] = time.time()
        self.request_dict["ignore_result"] = self.task.ignore_result  # the result is the contract's, not the client's
        self._client_limit = self._limit_of_client()
        self.time_limits = (self._client_limit, None)

    @property
    def job_id(self) -> str:
        """The id of the fork or campaign that the message is a part of."""
        return text_of(self.kwargs, "fork_id") or text_of(self.kwargs, "campaign_id") or str(self.id)

    # -- Celery's own ends

    def _limit_of_client(self) -> float | None:
        """How long its client lets the message take, in seconds; None: the worker's own limit holds alone.

        It holds once: what comes again needs its time to end the fork. This program's own messages carry the limit of
        the process that sent them (`Celery.send_task`), which is no client's wish.
        """
        if "#" in str(self.delivery_info["routing_key"]) or self.request_dict.get("redelivered"):
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
        """No: what was revoked is cancelled by the child that takes it, and whether it expired is seen there."""
        if self.is_revoked():
            self._ask_for_end("it was revoked")
        return False

    def terminate(self, pool: Any, signal: Any = None) -> None:
        """Have the fork cancelled; the child that works on it looks for that, and is not killed."""
        self._ask_for_end("it was terminated")

    def on_timeout(self, soft: bool, timeout: float) -> None:
        """Have the fork cancelled if the limit was its client's; `on_failure` does the rest.

        The worker's own limit is a net under what hangs: the task is done again by another process.
        """
        log.error("%s[%s] took more than %s s; its process is killed", self.name, self.id, timeout)
        if self._client_limit is not None:
            self._ask_for_end(f"it took more than its client's limit of {timeout} s")

    def _ask_for_end(self, why: str) -> None:
        log.warning("%s[%s]: cancellation requested: %s", self.name, self.id, why)
        try:
            self.cancel_job()
        except (RedisError, OperationalError, OSError) as error:
            log.warning("%s[%s]: Redis did not take the cancellation: %s", self.name, self.id, cause(error))

    # -- failures

    def on_failure(self, exc_info: Any, *args: Any, **kwargs: Any) -> Any:
        """As Celery does for a fork that failed. Any other failure is one of the process or of Redis, not of the fork.

        Where Redis did not take something, the message goes back to its queue. So it does where the process was lost,
        in whichever way; but once too many processes died of a message, its fork is given up.
        """
        error = getattr(exc_info.exception, "exc", exc_info.exception)  # billiard's ExceptionWithTraceback around it
        if isinstance(error, OutOfMemoryError) or is_passing(error):
            task_ready(self)
            log.warning("%s[%s] goes back to its queue: %s", self.name, self.id, cause(error))
            return self.reject(requeue=True)
        if not isinstance(error, _ENDS) and not state.should_terminate:
            exc_info = self._lost(error)
        return super().on_failure(exc_info, *args, **kwargs)

    def _lost(self, error: BaseException) -> Any:
        """What Celery is given for a lost process: that it was lost, or that nothing is to be done."""
        late = isinstance(error, TimeLimitExceeded)
        reason = "it took too long" if late else f"{type(error).__name__}: {cause(error)}"
        with suppress(RedisError, OperationalError, OSError):  # then it is tried once more
            losses = self.count_loss()
            if losses >= MAX_LOSSES:
                log.error("%d processes died of %s[%s]; its fork is given up", losses, self.name, self.id)
                self.abandon(self.job_id, self._destination())
                return _info(Ignore())
        return _info(error if isinstance(error, WorkerLostError) else WorkerLostError(reason))

    def _success_was_stored(self) -> bool:
        """No: Celery 5.7 would take the message for done, and who gets it again removes what the lost process left."""
        return False

    # -- what needs Redis

    def cancel_job(self) -> None:
        """Ask for the end of its fork or campaign. Raises RedisError, OperationalError."""
        raise NotImplementedError

    def count_loss(self) -> int:
        """Count one more process that died of it; how many by now."""
        raise NotImplementedError

    def abandon(self, job_id: str, destination: str) -> None:
        """Have its fork given up."""
        raise NotImplementedError

    def _destination(self) -> str:
        request = self.kwargs.get("request", next(iter(self.args), None))
        return text_of(self.kwargs, "destination") or text_of(request, "destination")


def _info(error: Exception) -> ExceptionInfo:
    """An error as Celery's callbacks are told it."""
    try:
        raise error
    except Exception:
        return ExceptionInfo()
