"""Cancelling a job, from the command line or by Celery's `revoke`."""

from __future__ import annotations

from celery import Celery

from tasks.delivery.sending import send_once
from tasks.names import FINISH_CAMPAIGN_TASK, FINISH_TASK, inner_queue
from tasks.store.results import Results


def cancel_job(app: Celery, results: Results, job_id: str) -> None:
    """Request the cancellation of a fork or campaign, started or not, and send the task that ends it.

    Raises RedisError, OperationalError.
    """
    results.cancellations.request(job_id)
    claim = results.claims.get(job_id)
    if claim is None:
        return
    task, place = (FINISH_CAMPAIGN_TASK, "home") if claim.get("campaign") else (FINISH_TASK, "destination")
    queue = inner_queue(claim["queue"], task)
    send_once(app, task, {place: claim["destination"]}, job_id, queue)
