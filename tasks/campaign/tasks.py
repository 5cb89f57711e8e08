"""The Celery tasks of a campaign: a few lines each over the functions that do the work."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from celery import Celery

from tasks.campaign.batch import run_batch
from tasks.campaign.finish import run_finish_campaign
from tasks.campaign.start import run_campaign
from tasks.campaign.takeover import take_over_batch, take_over_finish, take_over_start
from tasks.context import Context
from tasks.copier.campaign.spec import CampaignResult
from tasks.delivery.canvas import Job
from tasks.delivery.message import Message, task_options
from tasks.delivery.outcome import end_task, with_retries
from tasks.delivery.task_request import AnyTask, is_expired, job_id, request_argument, seconds_queued
from tasks.names import BATCH_TASK, CAMPAIGN_TASK, FINISH_CAMPAIGN_TASK
from tasks.store.campaign.results import CampaignResults


class CampaignMessage(Message):
    """A message of a campaign. If too many processes die of it, the campaign is abandoned."""

    def abandon(self, job_id: str, destination: str) -> None:
        """Send the task that ends the campaign. Raises RedisError, OperationalError."""
        home = CampaignResults(self.results(), job_id).abandon()
        self.send_end(FINISH_CAMPAIGN_TASK, {"home": home}, job_id)


def register_campaigns(app: Celery, context_of: Callable[[AnyTask], Context]) -> None:
    """Give `app` the tasks of campaigns. `context_of` makes the context of a running task."""
    part = task_options(CampaignMessage) | {"ignore_result": True}
    job = task_options(CampaignMessage) | {"base": Job}

    @app.task(name=CAMPAIGN_TASK, **job)
    def campaign(self: AnyTask, *args: Any, **kwargs: Any) -> CampaignResult:
        """Many forks of one source: an entry of the contract. Its one argument is `request`."""
        context, request = context_of(self), request_argument(args, kwargs)
        queued, expired = seconds_queued(self), is_expired(self)
        run = partial(run_campaign, context, job_id(self), request, queued, expired=expired)
        take_over = partial(take_over_start, context, job_id(self))
        return end_task(self, context, with_retries(self, context, {"request": request}, run, take_over))

    @app.task(name=BATCH_TASK, **part)
    def batch(self: AnyTask, campaign_id: str, home: str, first: int) -> None:
        """Some forks of a campaign."""
        context, arguments = context_of(self), {"campaign_id": campaign_id, "home": home, "first": first}
        run = partial(run_batch, context, campaign_id, home, first)
        with_retries(self, context, arguments, run, partial(take_over_batch, context, campaign_id, home, first))

    @app.task(name=FINISH_CAMPAIGN_TASK, **job)
    def finish_campaign(self: AnyTask, home: str) -> CampaignResult:
        """The end of a campaign. It has the campaign's own id, so its final state is the campaign's."""
        context = context_of(self)
        run = partial(run_finish_campaign, context, job_id(self), home)
        take_over = partial(take_over_finish, context, job_id(self), home)
        return end_task(self, context, with_retries(self, context, {"home": home}, run, take_over))
