"""A client that uses only the contract: it sends forks and reads their results."""

from __future__ import annotations

import gc
import json
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import Celery
from celery.result import AsyncResult

from tasks.copier.fork_spec import ForkResult
from tasks.copier.report import FileResult
from tasks.names import SWEEP_TASK
from tasks.store.results import Results
from tests.fixtures.processes import wait_until
from tests.fixtures.redis_server import RedisServer
from worker.runtime.configuration import UNACKED_KEY

QUEUE = "forkvm"
#: All queues of the default domain, and kombu's hash of messages that were delivered and not acknowledged.
QUEUES = (QUEUE, f"{QUEUE}#chunk", f"{QUEUE}#finish", f"{QUEUE}#batch")
UNACKED = UNACKED_KEY
#: Seconds to wait for a fork to end, far more than any takes.
TIMEOUT = 40.0
#: The names of the errors with which Redis refuses a write: it is full, or accepts none.
_REFUSALS = ("OOM", "READONLY", "NOREPLICAS", "MISCONF", "NOPERM")
#: The number of polls in a row, 20 ms apart, that must find no message.
_QUIET_POLLS = 5


class Scheduler:
    """Sends forks by task name. Reads their results through Celery, and the rest through `Results`."""

    def __init__(self, app: Celery, server: RedisServer) -> None:
        self.app = app
        self.server = server
        self.redis: redis.Redis = server.client(decode_responses=False)
        self.results = Results(self.redis, 3600, lambda fork_id: f"celery-task-meta-{fork_id}")

    def close(self) -> None:
        """Call it while the server still runs."""
        gc.collect()
        # A result that is garbage-collected unsubscribes from the server. If the traceback of a failed test holds one,
        # it would do so during a later test, when its server no longer runs.
        setattr(self.app.backend, "remove_pending_result", lambda result: result)  # noqa: B010
        self.redis.close()

    def send(self, request: object, fork_id: str | None = None) -> AsyncResult[Any]:
        return self.send_call(fork_id, kwargs={"request": request})

    def send_call(
        self, fork_id: str | None = None, *, args: list[Any] | None = None, kwargs: Mapping[str, Any] | None = None
    ) -> AsyncResult[Any]:
        """Send `forkvm.fork` with any arguments, valid or not."""
        return self.app.send_task(
            "forkvm.fork", args=args, kwargs=dict(kwargs or {}), task_id=fork_id or uuid.uuid4().hex, queue=QUEUE
        )

    def fork(self, source: Path, destination: Path, fork_id: str | None = None, **fields: Any) -> ForkResult:
        """One fork from its request to its result; raises Celery's exception if it failed."""
        return self.wait(self.send({"source": str(source), "destination": str(destination), **fields}, fork_id))

    def wait(self, sent: AsyncResult[Any], timeout: float = TIMEOUT) -> ForkResult:
        result: ForkResult = sent.get(timeout=timeout)
        return result

    def wait_failed(self, sent: AsyncResult[Any], timeout: float = TIMEOUT) -> tuple[str, ForkResult]:
        """Wait for a failure. Returns the exception's message and the whole ForkResult."""
        with pytest.raises(Exception) as raised:  # noqa: PT011 - the type is made up by the client's Celery
            sent.get(timeout=timeout)
        assert sent.state in ("FAILURE", "REVOKED"), repr(raised.value)
        result = self.results.final.fork(str(sent.id))
        assert result is not None, f"no ForkResult for {raised.value!r}"
        return str(raised.value), result

    def files(self, fork_id: str) -> list[FileResult]:
        return list(self.results.pages.files(fork_id))

    def wait_quiet(self) -> None:
        """Return when no message is queued or unacknowledged, so that nothing more will happen.

        Several polls in a row must agree: kombu takes a message from its list before it records it as unacknowledged.
        """
        quiet_polls = [0]

        def quiet() -> bool:
            quiet_polls[0] = 0 if any(self.messages().values()) else quiet_polls[0] + 1
            return quiet_polls[0] >= _QUIET_POLLS

        wait_until(quiet, "the end of all messages")

    def messages(self) -> dict[str, int]:
        """The number of messages in each queue, and of unacknowledged ones, without sweeps that are running."""
        counts = {queue: int(self.redis.llen(queue)) for queue in QUEUES}
        unacked = [message for message in self.redis.hvals(UNACKED) if SWEEP_TASK.encode() not in message]
        return counts | {UNACKED: len(unacked)}

    def refused(self) -> int:
        """The number of writes that Redis has refused since its start."""
        errors = self.redis.info("errorstats")
        return sum(int(errors.get(f"errorstat_{name}", {"count": 0})["count"]) for name in _REFUSALS)

    def wait_refused(self, count: int) -> None:
        """Return when Redis has refused `count` more writes."""
        before = self.refused()
        wait_until(lambda: self.refused() >= before + count, f"{count} writes that Redis refuses")

    @contextmanager
    def watching(self, fork_id: str) -> Iterator[list[dict[str, Any]]]:
        """Collects every record that is published for a fork, in order, during the with block."""
        records: list[dict[str, Any]] = []
        with self.server.client() as client, client.pubsub(ignore_subscribe_messages=True) as channel:
            channel.subscribe(**{f"celery-task-meta-{fork_id}": lambda m: records.append(json.loads(m["data"]))})
            channel.get_message(timeout=5)  # the subscription exists
            thread = channel.run_in_thread(sleep_time=0.05, daemon=True)
            try:
                yield records
            finally:
                thread.stop()
                thread.join()


def states(records: list[dict[str, Any]]) -> list[str]:
    """The states in the order of publication, without repetitions."""
    seen = [str(record["status"]) for record in records]
    return [state for n, state in enumerate(seen) if n == 0 or seen[n - 1] != state]
