"""Taking a campaign, or one of its batches, from a process that holds it and gives no heartbeat.

Each function is called with the holder's last heartbeat. It returns the campaign's result, or raises RetryLater: the
message then goes back to its queue and finds the campaign free.
"""

from __future__ import annotations

import errno
import logging
from contextlib import suppress
from typing import NoReturn

from tasks import events
from tasks.campaign.ending import end_from_claim
from tasks.campaign.finish import run_finish_campaign
from tasks.context import Context
from tasks.copier.campaign.batch import seize_batch
from tasks.copier.campaign.plan import open_campaign
from tasks.copier.campaign.spec import CampaignResult
from tasks.copier.errors import Code, ForkError
from tasks.copier.staging import takeover
from tasks.copier.staging.control_directory import LOCK_WAIT, Held
from tasks.delivery.outcome import RetryLater

log = logging.getLogger(__name__)


def take_over_start(context: Context, campaign_id: str, heartbeat: int | None) -> NoReturn:
    """Take a campaign from a process that plans it, so that it is planned again."""
    claim = context.results.claims.get(campaign_id)
    if claim is not None:
        with suppress(ForkError, OSError), context.roots.open_parent(claim["destination"]) as parent:
            if takeover.take_over(parent.fd, campaign_id, heartbeat) is not None:
                _note(campaign_id, "its plan")
    raise RetryLater(heartbeat)


def take_over_batch(context: Context, campaign_id: str, home: str, first: int, heartbeat: int | None) -> NoReturn:
    """Take the batch that begins with the index `first` from the process that makes it."""
    with (
        suppress(Held, ForkError, OSError),
        open_campaign(context.roots, home, campaign_id, LOCK_WAIT) as campaign,
    ):
        if campaign is not None:
            seize_batch(campaign, context.roots, first)
            _note(campaign_id, f"the batch from fork {campaign.spec.aims.start + first} on")
    raise RetryLater(heartbeat)


def take_over_finish(context: Context, campaign_id: str, home: str, heartbeat: int | None) -> CampaignResult | None:
    """End a campaign although processes hold it, or although its staging is gone."""
    if heartbeat is None:
        return _store_removed(context, campaign_id)
    try:
        result = run_finish_campaign(context, campaign_id, home, seized=True)
        _note(campaign_id, "its end")
        return result
    except RetryLater:  # held alone: by a process that plans it, or by a process that is not a worker's
        take_over_start(context, campaign_id, heartbeat)


def _note(campaign_id: str, what: str) -> None:
    log.warning("campaign %s: %s was taken from a process that gave no heartbeat", campaign_id, what)
    events.happened("takeover")


def _store_removed(context: Context, campaign_id: str) -> CampaignResult:
    """End a campaign whose staging others removed, or whose staging cannot be read."""
    claim = context.results.claims.get(campaign_id)
    home = claim["destination"] if claim is not None else ""
    error = ForkError(Code.IO_ERROR, "its staging directory was removed or cannot be read", home, errno.ENOENT)
    return end_from_claim(context, campaign_id, error)
