"""The command line's side of the queue: sending, asking, waiting, ending."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from celery import Celery, states
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from tasks.app import FORK_TASK, inner_queue, results_of
from tasks.context import FINISH_TASK
from tasks.copier.progress import Progress
from tasks.copier.spec import ForkResult
from tasks.results import Results
from worker.configuration import make_app
from worker.settings import NoBroker, Settings
from worker.show import ShowProgress
from worker.tls import without_password

#: How often a waiting command looks, in seconds.
_LOOK_SECONDS = 0.1


@dataclass(frozen=True)
class Status:
    """What is known of a fork: Celery's state, the progress while it runs, the ForkResult at its end."""

    state: str
    progress: Progress | None
    result: ForkResult | None


class Client:
    """One connection to the queue and the results."""

    def __init__(self, settings: Settings) -> None:
        self._app: Celery = make_app(settings)
        self._queue = settings.queue
        self.results: Results = results_of(self._app, settings.result_expires, patient=False)
        try:
            # One try each: a person waits at the terminal.
            with self._app.connection_for_write() as connection:
                connection.ensure_connection(max_retries=1, interval_start=0, interval_step=0)
            self.results.redis.ping()
        except (OperationalError, RedisError, OSError) as error:
            raise NoBroker(f"no broker at {without_password(settings.broker_url)}: {error}") from None

    def submit(self, request: dict[str, Any], fork_id: str) -> None:
        """Enqueue a fork."""
        self._send(FORK_TASK, {"request": request}, fork_id, self._queue, {"sent_at": time.time()})

    def status(self, fork_id: str) -> Status:
        """What is known of a fork."""
        result = self.results.result(fork_id)
        record = self.results.state(fork_id)
        if result is not None:
            return Status(_STATES[result["status"]], None, result)
        progress = record["result"] if record["status"] == "PROGRESS" else None
        return Status(record["status"], progress, None)

    def wait(self, fork_id: str, show: ShowProgress, timeout: float | None = None) -> Status:
        """Wait until the fork has ended, for at most `timeout` seconds; returns its last status."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            status = self.status(fork_id)
            if status.progress is not None:
                show(status.progress)
            if status.state in states.READY_STATES or (deadline is not None and time.monotonic() > deadline):
                return status
            time.sleep(_LOOK_SECONDS)

    def cancel(self, fork_id: str) -> None:
        """Ask for an end of the fork, and see that someone looks after it."""
        self.results.cancel(fork_id)
        claim = self.results.claim_of(fork_id)
        if claim is not None:
            queue = inner_queue(claim["queue"], FINISH_TASK)
            self._send(FINISH_TASK, {"destination": claim["destination"]}, fork_id, queue, {})

    def is_live(self, fork_id: str) -> bool:
        """Whether the queue has still to end a fork that a worker began."""
        return self.results.claim_of(fork_id) is not None and self.results.result(fork_id) is None

    def _send(self, task: str, kwargs: dict[str, Any], fork_id: str, queue: str, headers: dict[str, Any]) -> None:
        try:
            self._app.send_task(task, kwargs=kwargs, task_id=fork_id, queue=queue, headers=headers, retry=False)
        except (OperationalError, RedisError) as error:
            raise NoBroker(f"the broker did not take the message: {error}") from None


_STATES = {"succeeded": states.SUCCESS, "failed": states.FAILURE, "cancelled": states.REVOKED}
