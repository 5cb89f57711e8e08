"""The Celery tasks of campaigns: a few lines each over the functions that do the work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from celery import Celery, states
from celery.exceptions import Ignore, TaskRevokedError

from tasks.app import COMMON, AnyTask, given_request, go_back, is_stale, job_id, queued, seen_of
from tasks.batch import run_batch, take_over_batch
from tasks.campaign import run_campaign, take_over_campaign
from tasks.conclude import run_conclude, settle_gone
from tasks.context import BATCH_TASK, CONCLUDE_TASK, GONE, Again, Context
from tasks.contract import ForkFailed
from tasks.copier.campaign import CampaignResult
from tasks.copier.errors import describe

CAMPAIGN_TASK = "forkvm.campaign"


def register_campaigns(app: Celery, context: Callable[[AnyTask], Context]) -> None:
    """Give `app` the tasks of campaigns; `context` is what `tasks.app.surroundings` gave."""

    @app.task(name=CAMPAIGN_TASK, **COMMON)
    def campaign(self: AnyTask, *args: Any, **kwargs: Any) -> CampaignResult:
        """Many forks of one source; the contract's entry. Its one argument is `request`."""
        request = given_request(args, kwargs)
        try:
            return _answer(self, run_campaign(context(self), job_id(self), request, queued(self)))
        except Again as again:
            seen = seen_of(self, again)
            if is_stale(seen):
                take_over_campaign(context(self), job_id(self), again.pulse)
            go_back(self, context(self), seen, {"request": request})

    @app.task(name=BATCH_TASK, ignore_result=True, **COMMON)
    def batch(self: AnyTask, campaign_id: str, home: str, first: int) -> None:
        """Some forks of a campaign."""
        try:
            run_batch(context(self), campaign_id, home, first)
        except Again as again:
            seen = seen_of(self, again)
            if is_stale(seen):
                take_over_batch(context(self), campaign_id, home, first)
            go_back(self, context(self), seen, {"campaign_id": campaign_id, "home": home, "first": first})

    @app.task(name=CONCLUDE_TASK, **COMMON)
    def conclude(self: AnyTask, home: str) -> CampaignResult:
        """The end of a campaign; runs under the campaign's own id, so that its outcome is the campaign's."""
        try:
            return _answer(self, run_conclude(context(self), job_id(self), home))
        except Again as again:
            seen = seen_of(self, again)
            if is_stale(seen) and again.pulse == GONE:
                return _answer(self, settle_gone(context(self), job_id(self)))
            if is_stale(seen):
                return _answer(self, run_conclude(context(self), job_id(self), home, seized=True))
            go_back(self, context(self), seen, {"home": home})


def _answer(task: AnyTask, result: CampaignResult | None) -> CampaignResult:
    """End the task as its campaign ended; without a result, as if it had not run.

    A campaign has a result also where forks failed; only one that could not be begun at all fails itself.
    """
    if result is None:
        raise Ignore
    error = result["error"]
    if error is not None and result["status"] == "cancelled":
        task.backend.store_result(job_id(task), TaskRevokedError(describe(error)), states.REVOKED)
        raise Ignore
    if error is not None and result["status"] == "failed":
        raise ForkFailed(describe(error))
    return result
