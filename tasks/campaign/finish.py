"""`forkvm.conclude`: ends a campaign once all of its forks have ended, or once no further fork is to be made."""

from __future__ import annotations

import logging
from contextlib import suppress

from tasks.campaign.ending import end_from_claim, store_result, stored_result
from tasks.campaign.lanes import is_over, send_batches
from tasks.campaign.ledger import ledger_of
from tasks.context import Context
from tasks.copier.campaign.batch import seize_batch
from tasks.copier.campaign.finish import end_rest, remove_annexes
from tasks.copier.campaign.plan import Campaign, campaign_in
from tasks.copier.campaign.spec import CampaignResult, campaign_result, forks_done
from tasks.copier.errors import ForkError, from_record
from tasks.copier.progress import Progress, Ticker
from tasks.copier.staging.control_directory import LOCK_WAIT, Held
from tasks.copier.staging.proof import NotOurs
from tasks.copier.staging.staging import Staging
from tasks.copier.validation import Malformed
from tasks.delivery.outcome import RetryLater, open_parent_or_retry, outcome_of
from tasks.names import CAMPAIGN_TASK
from tasks.store.campaign.results import CampaignResults

log = logging.getLogger(__name__)


def run_finish_campaign(
    context: Context, campaign_id: str, home: str, *, seized: bool = False
) -> CampaignResult | None:
    """End a campaign that is over, and leave nothing of it but its forks: its result.

    None if it is not over: what remains to be done is sent again. `seized`: all its holders are stale, so their batches
    are taken from them first. Raises RetryLater while batches are still made, and if nothing is found of the campaign.
    """
    if (known := stored_result(context, campaign_id)) is not None:
        return known

    def fail(error: ForkError | OSError) -> CampaignResult | None:
        if isinstance(error, OSError):  # a later try may be able to read it; otherwise a stale finish ends the campaign
            log.warning("the staging of campaign %s cannot be read: %s", campaign_id, error)
            raise RetryLater(None) from None
        if not isinstance(error, NotOurs | Malformed):
            raise error
        # The campaign's own request, if it is kept, ends each of its forks.
        return None if _send_request(context, campaign_id) else end_from_claim(context, campaign_id, error)

    return outcome_of(lambda: _finish(context, campaign_id, home, seized=seized), fail)


def _finish(context: Context, campaign_id: str, home: str, *, seized: bool) -> CampaignResult | None:
    results = ledger_of(context, campaign_id)
    with (
        open_parent_or_retry(context.roots, home) as parent,
        Staging.attach(parent.fd, campaign_id, LOCK_WAIT, alone=not seized) as staging,
    ):
        if staging is not None:
            with staging.with_heartbeat():
                return _finish_staging(context, results, staging, home, seized=seized)
    known = results.result()
    if known is None and not _send_request(context, campaign_id):
        raise RetryLater(None)  # another task may be about to plan it
    return known


def _finish_staging(
    context: Context, results: CampaignResults, staging: Staging, home: str, *, seized: bool
) -> CampaignResult | None:
    campaign = campaign_in(staging)
    if campaign is None:
        error = results.reason_to_end(home)
        if _send_request(context, results.campaign_id) or error is None:
            return None  # the request plans the campaign, or ends each of its forks
        result = end_from_claim(context, results.campaign_id, error)
    elif not is_over(results, campaign):
        send_batches(context, results, campaign, home)
        return None
    else:
        _end_forks(context, results, campaign, seized=seized)
        result = store_result(results, campaign.spec, _result(results, campaign))
        remove_annexes(campaign, context.roots)
    with suppress(OSError, ForkError):
        staging.remove()
    return result


def _send_request(context: Context, campaign_id: str) -> bool:
    """Send the campaign's own request again. False if its list of destinations was too long to keep."""
    claim = context.results.claims.get(campaign_id)
    request = claim["request"]["kept"] if claim is not None else {}
    if "destinations" not in request:
        return False
    context.send(CAMPAIGN_TASK, {"request": request}, campaign_id)
    return True


def _end_forks(context: Context, results: CampaignResults, campaign: Campaign, *, seized: bool) -> None:
    """End every fork that is not published."""
    count, batch = campaign.spec.aims.count, campaign.plan.batch
    if forks_done(results.sums()) >= count:
        return
    if seized:
        for first in range(0, count, batch):
            if not results.is_batch_done(first):
                with suppress(ForkError, OSError, Held):  # `end_rest` fails such a batch, or raises Held
                    seize_batch(campaign, context.roots, first)
    error = results.reason_to_end(campaign.spec.source)
    if error is not None:
        end_rest(campaign, context.roots, Ticker(_never_stop), results, error)


def _result(results: CampaignResults, campaign: Campaign) -> CampaignResult:
    sums, failures = results.sums(), results.failures()
    error = None
    if sums.get("forks.cancelled"):
        error = results.reason_to_end(campaign.spec.source)
        if campaign.spec.aims.on_error == "abort" and failures:
            error = from_record(failures[0]["error"])
    return campaign_result(campaign.spec, sums, failures, planned_at=campaign.planned_at, error=error)


def _never_stop(progress: Progress) -> None:
    """The end of a campaign cannot be cancelled."""
