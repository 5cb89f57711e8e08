"""The command line's side of the queue: sending, asking, waiting, ending."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

from celery import Celery, states
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from tasks.contract.campaign_request import Summary
from tasks.copier.campaign.spec import CampaignProgress, CampaignResult
from tasks.copier.errors import Code, ForkError
from tasks.copier.fork_spec import ForkResult
from tasks.copier.progress import Progress
from tasks.delivery.backend import results_of
from tasks.delivery.cancel import cancel_job
from tasks.delivery.waiting import is_waiting
from tasks.fork.foreign_ids import why_taken
from tasks.names import CAMPAIGN_TASK, FORK_TASK
from tasks.store.campaign.fork_ids import campaign_of_fork
from tasks.store.campaign.results import CampaignResults
from tasks.store.job_states import final_state
from tasks.store.redis_errors import cause
from tasks.store.results import Results
from worker.runtime.configuration import UNACKED_KEY, make_app
from worker.settings import NoBroker, Settings
from worker.terminal.printing import ShowProgress, print_message

#: How often a waiting command looks, in seconds.
_LOOK_SECONDS = 0.1
#: After so long, in seconds, a waiting command asks whether any worker serves the queue.
_UNSERVED_SECONDS = 2.0
#: How long workers have to answer that, in seconds.
_ANSWER_SECONDS = 1.0


@dataclass(frozen=True)
class Status:
    """What is known of a fork or campaign: Celery's state, the progress while it runs, the result at its end."""

    state: str
    progress: Progress | CampaignProgress | None
    result: ForkResult | CampaignResult | None


class Client:
    """One connection to the queue and the results."""

    def __init__(self, settings: Settings) -> None:
        self._app: Celery = make_app(settings)
        self._queue = settings.queue
        self.results: Results = results_of(self._app, patient=False)
        try:
            # One try each: a person waits at the terminal.
            with self._app.connection_for_write() as connection:
                connection.ensure_connection(max_retries=1, interval_start=0, interval_step=0)
            self.results.redis.ping()
        except (OperationalError, RedisError, OSError) as error:
            raise NoBroker(f"no broker at {settings.broker.shown()}: {cause(error)}") from None

    def submit(self, request: dict[str, Any], fork_id: str) -> None:
        """Enqueue a fork. Raises ForkError invalid_request where another job has the id."""
        self._check_id(fork_id, self._queue)
        self._send(FORK_TASK, {"request": request}, fork_id, self._queue, {"sent_at": time.time()})

    def submit_campaign(self, request: dict[str, Any], campaign_id: str, queue: str | None = None) -> None:
        """Enqueue a campaign; into the settings' domain, unless `queue` is another's.

        Raises ForkError invalid_request where another job has the id.
        """
        queue = queue or self._queue
        self._check_id(campaign_id, queue)
        self._send(CAMPAIGN_TASK, {"request": request}, campaign_id, queue, {"sent_at": time.time()})

    def status(self, job_id: str) -> Status:
        """What is known of a fork or campaign."""
        # The state first: a job whose state is final had its result kept before.
        record = self.results.states.get(job_id)
        result = cast("ForkResult | CampaignResult | None", self.results.final.get(job_id))
        if result is not None:
            return Status(final_state(result), None, result)
        progress = record["result"] if record["status"] == "PROGRESS" else None
        return Status(record["status"], progress, None)

    def campaign_forks(self, campaign_id: str, summary: Summary) -> Iterator[ForkResult]:
        """Yield the results of a campaign's forks that have ended by now, in order."""
        return CampaignResults(self.results, campaign_id).forks(summary["start"], summary["forks"])

    def campaign_of_fork(self, job_id: str) -> str | None:
        """The campaign that this is a fork of; None for a job of its own, or an unknown id."""
        return None if self.results.claims.get(job_id) is not None else campaign_of_fork(self.results, job_id)

    def is_known(self, job_id: str, status: Status) -> bool:
        """Whether the job whose status is `status` was begun, has ended, or waits in the queue of the settings."""
        if status.state != states.PENDING or self.results.claims.get(job_id) is not None:
            return True
        if self.campaign_of_fork(job_id) is not None:
            return True
        with self._app.connection_for_read() as connection:
            channel: Any = connection.default_channel
            if is_waiting(channel.client, job_id, self._queue, UNACKED_KEY):
                return True
        return self.status(job_id).state != states.PENDING  # a worker took it between the two looks

    def is_served(self, queue: str | None = None) -> bool:
        """Whether a worker takes messages from `queue` (default: that of the settings); takes a second."""
        inspect = self._app.control.inspect(timeout=_ANSWER_SECONDS)
        queues = (inspect.active_queues() or {}).values()
        return any(found["name"] == (queue or self._queue) for served in queues for found in served)

    def wait(self, job_id: str, show: ShowProgress, timeout: float | None = None, queue: str | None = None) -> Status:
        """Wait until the job has ended, for at most `timeout` seconds; returns its last status.

        A line on stderr says so where no worker serves its `queue` (default: that of the settings).
        """
        began = time.monotonic()
        asked = False
        while True:
            status = self.status(job_id)
            waited = time.monotonic() - began
            if status.progress is not None:
                show(status.progress)
            if status.state in states.READY_STATES or (timeout is not None and waited > timeout):
                return status
            if status.state == states.PENDING and waited > _UNSERVED_SECONDS and not asked:
                asked = True
                if not self.is_served(queue):
                    print_message(f"no worker serves the queue {queue or self._queue}; {job_id} waits until one does")
            time.sleep(_LOOK_SECONDS)

    def cancel(self, fork_id: str) -> None:
        """Ask for an end of the fork, and see that someone looks after it."""
        try:
            cancel_job(self._app, self.results, fork_id)
        except (OperationalError, RedisError) as error:
            raise NoBroker(f"the broker did not take the cancellation: {cause(error)}") from None

    def _check_id(self, job_id: str, queue: str) -> None:
        """What a worker would drop the request for, the caller learns here."""
        why = why_taken(self.results, job_id, queue, self.results.claims.get(job_id))
        if why is not None:
            raise ForkError(Code.INVALID_REQUEST, why, job_id)

    def _send(self, task: str, kwargs: dict[str, Any], fork_id: str, queue: str, headers: dict[str, Any]) -> None:
        try:
            self._app.send_task(
                task, kwargs=kwargs, task_id=fork_id, queue=queue, headers=headers, retry=False, time_limit=None
            )
        except (OperationalError, RedisError) as error:
            raise NoBroker(f"the broker did not take the message: {cause(error)}") from None
