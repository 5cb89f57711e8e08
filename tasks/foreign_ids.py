"""Requests whose id belongs to another job. The state under the id is that job's, so nothing is written under it."""

from __future__ import annotations

import logging

from tasks.campaigns.fork_ids import campaign_of_fork
from tasks.context import Context
from tasks.results import Claim

log = logging.getLogger(__name__)


def is_of_another_job(context: Context, job_id: str, holder: Claim | None) -> bool:
    """Whether a request is to be dropped, since its id was taken in another domain or by a campaign's fork; logs that.

    `holder`: the claim on the id, if there is one. It counts also after its job has ended, until its result expires:
    the result says what that job did.
    """
    if holder is not None and holder["queue"] == context.queue:
        return False
    if holder is not None:
        why = f"a job in the queue {holder['queue']!r} has this id, and this one came to {context.queue!r}"
    elif (campaign_id := campaign_of_fork(context.results, job_id)) and context.results.claim_of(job_id) is None:
        why = f"it is the id of a fork of the campaign {campaign_id!r}"
    else:
        return False
    log.warning("invalid_request: a request with the id %r was dropped: %s; send it under another id", job_id, why)
    return True
