"""What a worker's main process knows of a message that one of its children works on."""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from typing import Any

from billiard.einfo import ExceptionInfo
from billiard.exceptions import TimeLimitExceeded, WorkerLostError
from celery.exceptions import Ignore
from celery.worker.request import Request
from celery.worker.state import task_ready
from kombu.exceptions import OperationalError
from redis.exceptions import ConnectionError, OutOfMemoryError, RedisError, TimeoutError

from tasks.contract import text_of
from tasks.copier.chunk import MAX_TRIES

log = logging.getLogger(__name__)

#: So many processes may die of one message; then nothing of its fork is tried any more. What dies while it plans,
#: clones or closes is counted in the staging and ends before that. This is for what dies before it can count.
MAX_LOSSES = 3 * MAX_TRIES
#: What Redis answers, or does not, for a while only; any other error would come again each time.
_PASSING = (ConnectionError, TimeoutError, OutOfMemoryError, OperationalError)


class Message(Request):
    """A message that knows when it was taken from the queue, which Redis does not tell, and who died of it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.request_dict["received_at"] = time.time()

    def on_failure(self, exc_info: Any, *args: Any, **kwargs: Any) -> Any:
        """As Celery does, but for three things.

        A task that failed since Redis did not take something, its result above all, is done again: it was no failure
        of the fork. A process that was killed since it took too long is one that was lost. And of a message of which
        too many processes died, none dies any more.
        """
        error = getattr(exc_info.exception, "exc", exc_info.exception)  # billiard's ExceptionWithTraceback around it
        if isinstance(error, _PASSING):
            task_ready(self)
            log.warning("%s[%s] goes back to its queue: %s", self.name, self.id, error)
            return self.reject(requeue=True)
        if isinstance(error, TimeLimitExceeded):
            error = WorkerLostError("it took too long")
            exc_info = _info(error)
        if isinstance(error, WorkerLostError):
            with suppress(RedisError, OperationalError, OSError):  # then it is tried once more
                losses = self.count_loss()
                if losses >= MAX_LOSSES:
                    fork_id, destination = self._fork()
                    log.error("%d processes died of %s[%s]; its fork is given up", losses, self.name, self.id)
                    self.bury(fork_id, destination)
                    exc_info = _info(Ignore())
        return super().on_failure(exc_info, *args, **kwargs)

    def _success_was_stored(self) -> bool:
        """No: Celery 5.7 would take the message for done, and who gets it again removes what the lost process left."""
        return False

    def on_timeout(self, soft: bool, timeout: float) -> None:
        """A line in the log; `on_failure` does the rest, where Celery would call the task failed."""
        log.error("%s[%s] took more than %s s; its process is killed", self.name, self.id, timeout)

    def count_loss(self) -> int:
        """Count one more process that died of it; how many by now."""
        raise NotImplementedError

    def bury(self, fork_id: str, destination: str) -> None:
        """Have its fork given up."""
        raise NotImplementedError

    def _fork(self) -> tuple[str, str]:
        """Whose message it is: the fork's id, and its destination."""
        kwargs = self.kwargs
        request = kwargs.get("request", next(iter(self.args), None))
        fork_id = text_of(kwargs, "fork_id") or str(self.id)
        return fork_id, text_of(kwargs, "destination") or text_of(request, "destination")


def _info(error: Exception) -> ExceptionInfo:
    """An error as Celery's callbacks are told it."""
    try:
        raise error
    except Exception:
        return ExceptionInfo()
