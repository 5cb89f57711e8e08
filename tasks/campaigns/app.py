"""The Celery tasks of campaigns: a few lines each over the functions that do the work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from celery import Celery, states
from celery.exceptions import Ignore

from tasks.app import (
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
from tasks.backend import results_of
from tasks.campaigns.batch import run_batch, take_over_batch
from tasks.campaigns.campaign import run_campaign, take_over_campaign
from tasks.campaigns.conclude import run_conclude, settle_gone
from tasks.campaigns.results import CampaignResults
from tasks.cancel import cancel_job
from tasks.canvas import Job
from tasks.context import BATCH_TASK, CAMPAIGN_TASK, CONCLUDE_TASK, GONE, Again, Context
from tasks.contract import ForkFailed
from tasks.copier.campaigns.spec import CampaignResult
from tasks.copier.errors import describe
from tasks.message import Message
from tasks.queues import inner_queue
from tasks.results import end_state


def register_campaigns(app: Celery, context: Callable[[AnyTask], Context]) -> None:
    """Give `app` the tasks of campaigns; `context` is what `tasks.app.surroundings` gave."""

    class CampaignMessage(Message):
        """A message whose losses are counted in Redis; a campaign that kills whoever takes it up is ended."""

        def count_loss(self) -> int:
            return results_of(app, patient=False).count_loss(str(self.id))

        def bury(self, job_id: str, destination: str) -> None:
            results = CampaignResults(results_of(app, patient=False), job_id)
            home = results.bury()
            queue = inner_queue(domain_queue(self), CONCLUDE_TASK)
            app.send_task(CONCLUDE_TASK, kwargs={"home": home}, task_id=job_id, queue=queue, retry=False)

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
        except Again as again:
            seen = seen_of(self, again)
            if is_stale(seen):
                take_over_campaign(context(self), job_id(self), again.pulse)
            go_back(self, context(self), seen, {"request": request})

    @app.task(name=BATCH_TASK, ignore_result=True, **common)
    def batch(self: AnyTask, campaign_id: str, home: str, first: int) -> None:
        """Some forks of a campaign."""
        try:
            run_batch(context(self), campaign_id, home, first)
        except Again as again:
            seen = seen_of(self, again)
            if is_stale(seen):
                take_over_batch(context(self), campaign_id, home, first)
            go_back(self, context(self), seen, {"campaign_id": campaign_id, "home": home, "first": first})

    @app.task(name=CONCLUDE_TASK, **job)
    def conclude(self: AnyTask, home: str) -> CampaignResult:
        """The end of a campaign; runs under the campaign's own id, so that its outcome is the campaign's."""
        try:
            return _answer(self, run_conclude(context(self), job_id(self), home))
        except Again as again:
            seen = seen_of(self, again)
            if is_stale(seen) and again.pulse == GONE:
                return _answer(self, settle_gone(context(self), job_id(self)))
            if is_stale(seen):
                try:
                    return _answer(self, run_conclude(context(self), job_id(self), home, seized=True))
                except Again:  # held alone: by a planner, or by what is none of the worker's processes
                    take_over_campaign(context(self), job_id(self), again.pulse)
            go_back(self, context(self), seen, {"home": home})


def _answer(task: AnyTask, result: CampaignResult | None) -> CampaignResult:
    """End the task as its campaign ended; without a result, as if it had not run."""
    if result is None:
        raise Ignore
    error = result["error"]
    state = end_state(result)
    if error is None or state == states.SUCCESS:
        return result
    if state == states.REVOKED:
        cast(Job, task).end_as_revoked(job_id(task), describe(error))
        raise Ignore
    raise ForkFailed(describe(error))
