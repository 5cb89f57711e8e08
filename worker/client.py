"""The commands' connection to the queue and the results: submit, status, wait, cancel."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from celery import Celery, states
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from tasks.copier.errors import Code, ForkError
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

if TYPE_CHECKING:
    from tasks.contract.campaign_request import Summary
    from tasks.copier.campaign.spec import CampaignProgress, CampaignResult
    from tasks.copier.fork_spec import ForkResult
    from tasks.copier.progress import Progress
    from worker.overview import Overview

#: Interval in which a waiting command reads the status, in seconds.
_POLL_SECONDS = 0.1
#: Time after which a waiting command asks whether any worker serves the queue, in seconds.
_UNSERVED_SECONDS = 2.0
#: Time that workers have to answer that, in seconds.
_ANSWER_SECONDS = 1.0


@dataclass(frozen=True)
class Status:
    """The status of a fork or campaign: Celery's state, the progress while it runs, the result when it has ended."""

    state: str
    progress: Progress | CampaignProgress | None
    result: ForkResult | CampaignResult | None


class Client:
    """A connection to the queue and the results. Raises NoBroker if a Redis cannot be reached."""

    def __init__(self, settings: Settings) -> None:
        self._app: Celery = make_app(settings)
        #: The queue of the domain that the settings name.
        self.queue = settings.queue
        self.results: Results = results_of(self._app, patient=False)
        where = f"broker at {settings.broker.shown()}"
        try:
            # One attempt, because a person waits at the terminal.
            with self._app.connection_for_write() as connection:
                connection.ensure_connection(max_retries=1, interval_start=0, interval_step=0)
            where = f"result backend at {settings.backend.shown()}"
            self.results.redis.ping()
        except (OperationalError, RedisError, OSError) as error:
            raise NoBroker(f"no {where}: {cause(error)}") from None

    def submit(self, request: dict[str, Any], fork_id: str) -> None:
        """Queue a fork. Raises ForkError invalid_request if another job has the id."""
        self._check_id(fork_id, self.queue)
        self._send(FORK_TASK, {"request": request}, fork_id, self.queue, {"sent_at": time.time()})

    def submit_campaign(self, request: dict[str, Any], campaign_id: str, queue: str | None = None) -> None:
        """Queue a campaign in `queue` (default: the queue of the settings).

        Raises ForkError invalid_request if another job has the id.
        """
        queue = queue or self.queue
        self._check_id(campaign_id, queue)
        self._send(CAMPAIGN_TASK, {"request": request}, campaign_id, queue, {"sent_at": time.time()})

    def status(self, job_id: str) -> Status:
        """The status of a fork or campaign."""
        # The state first: a result is stored before its job's state becomes final.
        record = self.results.states.get(job_id)
        result = cast("ForkResult | CampaignResult | None", self.results.final.get(job_id))
        if result is not None:
            return Status(final_state(result), None, result)
        progress = record["result"] if record["status"] == "PROGRESS" else None
        return Status(record["status"], progress, None)

    def campaign_forks(self, campaign_id: str, summary: Summary) -> Iterator[ForkResult]:
        """Yield the results of those forks of a campaign that have ended, in order."""
        return CampaignResults(self.results, campaign_id).forks(summary["start"], summary["forks"])

    def campaign_of_fork(self, job_id: str) -> str | None:
        """The id of the campaign to which a fork belongs; None for other jobs and unknown ids."""
        return None if self.results.claims.get(job_id) is not None else campaign_of_fork(self.results, job_id)

    def is_known(self, job_id: str, status: Status) -> bool:
        """Whether the job whose status is `status` was begun, has ended, or waits in the queue of the settings."""
        if status.state != states.PENDING or self.results.claims.get(job_id) is not None:
            return True
        if self.campaign_of_fork(job_id) is not None:
            return True
        with self._app.connection_for_read() as connection:
            channel: Any = connection.default_channel
            if is_waiting(channel.client, job_id, self.queue, UNACKED_KEY):
                return True
        return self.status(job_id).state != states.PENDING  # a worker took it meanwhile

    def is_served(self, queue: str | None = None) -> bool:
        """Whether a worker consumes `queue` (default: the queue of the settings). Takes 1 s. Raises NoBroker."""
        inspect = self._app.control.inspect(timeout=_ANSWER_SECONDS)
        try:
            queues = (inspect.active_queues() or {}).values()
        except (OperationalError, RedisError, OSError) as error:
            raise NoBroker(f"Redis: {cause(error)}") from None
        return any(found["name"] == (queue or self.queue) for served in queues for found in served)

    def overview(self) -> Overview:
        """What the domain of the settings does at this moment. Takes 1 s. Raises NoBroker."""
        from worker.overview import read_overview  # it imports Celery's worker

        try:
            return read_overview(self._app, self.results, self.queue)
        except (OperationalError, RedisError, OSError) as error:
            raise NoBroker(f"Redis: {cause(error)}") from None

    def wait(self, job_id: str, show: ShowProgress, timeout: float | None = None, queue: str | None = None) -> Status:
        """Wait until the job has ended, for at most `timeout` seconds. Returns its last status.

        Prints a line on stderr if no worker serves its `queue` (default: the queue of the settings).
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
                    print_message(f"no worker serves the queue {queue or self.queue}; {job_id} waits until one does")
            time.sleep(_POLL_SECONDS)

    def cancel(self, fork_id: str) -> None:
        """Request the cancellation of a fork or campaign. Raises NoBroker."""
        try:
            cancel_job(self._app, self.results, fork_id)
        except (OperationalError, RedisError) as error:
            raise NoBroker(f"the broker did not accept the cancellation: {cause(error)}") from None

    def _check_id(self, job_id: str, queue: str) -> None:
        """Raise ForkError invalid_request for an id with which a worker would drop the request."""
        why = why_taken(self.results, job_id, queue, self.results.claims.get(job_id))
        if why is not None:
            raise ForkError(Code.INVALID_REQUEST, why, job_id)

    def _send(self, task: str, kwargs: dict[str, Any], fork_id: str, queue: str, headers: dict[str, Any]) -> None:
        try:
            self._app.send_task(
                task, kwargs=kwargs, task_id=fork_id, queue=queue, headers=headers, retry=False, time_limit=None
            )
        except (OperationalError, RedisError) as error:
            raise NoBroker(f"the broker did not accept the message: {cause(error)}") from None
