"""Requests whose id belongs to another job. They are dropped: nothing may change the state of that job."""

from __future__ import annotations

import logging

from tasks.context import Context
from tasks.store.campaign.fork_ids import campaign_of_fork
from tasks.store.claims import Claim
from tasks.store.results import Results

log = logging.getLogger(__name__)


def is_of_another_job(context: Context, job_id: str, holder: Claim | None) -> bool:
    """Whether a request is to be dropped because its id is used in another domain or by a campaign's fork; logs that.

    `holder`: the claim on the id, if there is one. It counts until the result of its job expires.
    """
    why = why_taken(context.results, job_id, context.queue, holder)
    if why is not None:
        log.warning("invalid_request: a request with the id %r was dropped: %s", job_id, why)
    return why is not None


def why_taken(results: Results, job_id: str, queue: str, holder: Claim | None) -> str | None:
    """Why a request with this id cannot be served from `queue`; None if it can."""
    if holder is not None and holder["queue"] == queue:
        return None
    if holder is not None:
        why = f"a job in the queue {holder['queue']!r} has this id, and this request is for the queue {queue!r}"
    elif (campaign_id := campaign_of_fork(results, job_id)) and results.claims.get(job_id) is None:
        why = f"it is the id of a fork of the campaign {campaign_id!r}"
    else:
        return None
    return f"{why}; send it under another id"
