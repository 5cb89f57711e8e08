"""Celery's result backend, with two rules: a final state never changes, and only a job's result decides it."""

from __future__ import annotations

import logging
from typing import Any, cast
from uuid import UUID

from celery import Celery
from celery.backends.redis import RedisBackend, SentinelBackend
from kombu.utils.encoding import bytes_to_str
from redis.exceptions import OutOfMemoryError

from tasks.contract import ForkFailed
from tasks.store import keys, lua
from tasks.store.job_states import READY_STATES
from tasks.store.redis_errors import is_passing, wait_out
from tasks.store.results import Results

#: A header of the message that ends a job whose client sent a UUID as its id. Celery's client recognizes the state of
#: its task by the id in the record, so this record has a UUID, too.
UUID_ID = "uuid_id"

log = logging.getLogger(__name__)


class FinalStates(RedisBackend):
    """Keeps every final state. Celery's Redis backends keep only SUCCESS, and read and write in two separate steps."""

    def exception_safe_to_retry(self, exc: BaseException) -> bool:
        """Whether Celery retries an operation: also if Redis refuses writes for a while."""
        return is_passing(exc)

    def set(self, key: Any, value: Any, expires: int | None = None, **_: Any) -> Any:
        """Store and publish a record, unless the record at `key` is final. Waits while Redis is away or full."""
        backend: Any = self  # celery-types does not know `expires`
        ttl = expires or backend.expires
        return wait_out(
            lambda: lua.SET_STATE.run(
                self.client,
                open_key=keys.OPEN.pattern,
                ttl=ttl,
                final_states=READY_STATES,
                more_keys=[key],
                more_args=[value, ""],
            ),
            OutOfMemoryError,
        )

    def _store_result(
        self, task_id: Any, result: Any, state: str, traceback: Any = None, request: Any = None, **_: Any
    ) -> Any:
        """Store and publish a record. Celery's method reads the present one first, which `set` does in one command."""
        backend: Any = self
        meta = backend._get_result_meta(result=result, state=state, traceback=traceback, request=request)
        meta["task_id"] = UUID(task_id) if getattr(request, UUID_ID, None) else bytes_to_str(task_id)
        backend.set(backend.get_key_for_task(task_id), backend.encode(meta))
        return result

    def mark_as_failure(self, task_id: str, exc: Exception, *args: Any, **kwargs: Any) -> None:
        """Store a failure. For this program's tasks, only ForkFailed is one: the job's result is stored already.

        Any other exception is a fault of the process or of Redis. The message then goes back to its queue
        (`tasks.delivery.message.Message.on_failure`), and the job has not ended.
        """
        request = kwargs.get("request")
        if _is_ours(request) and not isinstance(exc, ForkFailed):
            log.error(
                "%s[%s] failed without a result, and is delivered again: %s: %s",
                getattr(request, "task", ""),
                task_id,
                type(exc).__name__,
                exc,
            )
            return
        super().mark_as_failure(task_id, exc, *args, **kwargs)


class RedisResults(FinalStates):
    """The result backend for `redis://` and `rediss://` URLs."""


class SentinelResults(FinalStates, SentinelBackend):
    """The result backend behind sentinels."""


#: Replace Celery's own backends, by the scheme of the URL.
BACKENDS = {
    "redis": "tasks.delivery.backend:RedisResults",
    "rediss": "tasks.delivery.backend:RedisResults",
    "sentinel": "tasks.delivery.backend:SentinelResults",
}


def results_of(app: Celery, *, patient: bool) -> Results:
    """The results in the app's result backend."""
    backend = cast(RedisBackend, app.backend)
    return Results(
        backend.client,
        int(app.conf.result_expires),
        lambda fork_id: bytes_to_str(backend.get_key_for_task(fork_id)),
        patient,
    )


def _is_ours(request: Any) -> bool:
    return str(getattr(request, "task", "")).startswith("forkvm.")
