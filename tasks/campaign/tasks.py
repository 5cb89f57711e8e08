"""The Celery tasks of campaigns: a few lines each over the functions that do the work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from celery import Celery, states
from celery.exceptions import Ignore

from tasks.campaign.batch import run_batch, take_over_batch
from tasks.campaign.finish import run_finish_campaign, store_gone
from tasks.campaign.start import run_campaign, take_over_campaign
from tasks.context import Context, RetryLater
from tasks.contract import ForkFailed
from tasks.copier.campaign.spec import CampaignResult
from tasks.copier.errors import describe
from tasks.delivery.backend import results_of
from tasks.delivery.cancel import cancel_job
from tasks.delivery.canvas import Job
from tasks.delivery.message import Message
from tasks.fork.tasks import (
    AnyTask,
    domain_queue,
    given_request,
    go_back,
    is_expired,
    is_stale,
    job_id,
    options_of,
    queued,
    seen_of,
)
from tasks.names import BATCH_TASK, CAMPAIGN_TASK, FINISH_CAMPAIGN_TASK, inner_queue
from tasks.store.campaign.results import CampaignResults
from tasks.store.job_states import final_state


def register_campaigns(app: Celery, context: Callable[[AnyTask], Context]) -> None:
    """Give `app` the tasks of campaigns; `context` is what `tasks.fork.tasks.surroundings` gave."""

    class CampaignMessage(Message):
        """A message whose losses are counted in Redis; a campaign that kills whoever takes it up is ended."""

        def count_loss(self) -> int:
            return results_of(app, patient=False).open_jobs.count_loss(str(self.id))

        def abandon(self, job_id: str, destination: str) -> None:
            results = CampaignResults(results_of(app, patient=False), job_id)
            home = results.abandon()
            queue = inner_queue(domain_queue(self), FINISH_CAMPAIGN_TASK)
            app.send_task(FINISH_CAMPAIGN_TASK, kwargs={"home": home}, task_id=job_id, queue=queue, retry=False)

        def cancel_job(self) -> None:
            cancel_job(app, results_of(app, patient=False), self.job_id)

    common = options_of(CampaignMessage)
    job = common | {"base": Job}

    @app.task(name=CAMPAIGN_TASK, **job)
    def campaign(self: AnyTask, *args: Any, **kwargs: Any) -> CampaignResult:
        """Many forks of one source; the contract's entry. Its one argument is `request`."""
        request = given_request(args, kwargs)
        try:
            return _answer(
                self, run_campaign(context(self), job_id(self), request, queued(self), expired=is_expired(self))
            )
        except RetryLater as again:
            seen = seen_of(self, again)
            if is_stale(seen):
                take_over_campaign(context(self), job_id(self), again.heartbeat)
            go_back(self, context(self), seen, {"request": request})

    @app.task(name=BATCH_TASK, ignore_result=True, **common)
    def batch(self: AnyTask, campaign_id: str, home: str, first: int) -> None:
        """Some forks of a campaign."""
        try:
            run_batch(context(self), campaign_id, home, first)
        except RetryLater as again:
            seen = seen_of(self, again)
            if is_stale(seen):
                take_over_batch(context(self), campaign_id, home, first)
            go_back(self, context(self), seen, {"campaign_id": campaign_id, "home": home, "first": first})

    @app.task(name=FINISH_CAMPAIGN_TASK, **job)
    def finish_campaign(self: AnyTask, home: str) -> CampaignResult:
        """The end of a campaign; runs under the campaign's own id, so that its outcome is the campaign's."""
        try:
            return _answer(self, run_finish_campaign(context(self), job_id(self), home))
        except RetryLater as again:
            seen = seen_of(self, again)
            if is_stale(seen) and again.heartbeat is None:
                return _answer(self, store_gone(context(self), job_id(self)))
            if is_stale(seen):
                try:
                    return _answer(self, run_finish_campaign(context(self), job_id(self), home, seized=True))
                except RetryLater:  # held alone: by a planner, or by what is none of the worker's processes
                    take_over_campaign(context(self), job_id(self), again.heartbeat)
            go_back(self, context(self), seen, {"home": home})


def _answer(task: AnyTask, result: CampaignResult | None) -> CampaignResult:
    """End the task as its campaign ended; without a result, as if it had not run."""
    if result is None:
        raise Ignore
    error = result["error"]
    state = final_state(result)
    if error is None or state == states.SUCCESS:
        return result
    if state == states.REVOKED:
        cast(Job, task).end_as_revoked(job_id(task), describe(error))
        raise Ignore
    raise ForkFailed(describe(error))
