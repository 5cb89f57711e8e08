"""`forkvm.finish_campaign`: the end of a campaign, whether all of its forks have ended or not."""

from __future__ import annotations

import errno
import logging
from contextlib import suppress
from typing import Any

from tasks.campaign.context import results_in
from tasks.campaign.lanes import is_over, send_batches
from tasks.campaign.start import end_unplanned, known_campaign, store_result
from tasks.context import LOCK_WAIT, Context, RetryLater
from tasks.contract.campaign_request import campaign_of
from tasks.copier.campaign.batch import seize_batch
from tasks.copier.campaign.finish import end_rest, remove_annexes
from tasks.copier.campaign.plan import Campaign, campaign_in
from tasks.copier.campaign.spec import Aims, CampaignResult, CampaignSpec, campaign_result, forks_done
from tasks.copier.errors import Code, ForkError, from_record
from tasks.copier.progress import Progress, Ticker
from tasks.copier.staging.control_directory import Held
from tasks.copier.staging.proof import NotOurs
from tasks.copier.staging.staging import Staging
from tasks.copier.validation import Malformed
from tasks.names import CAMPAIGN_TASK
from tasks.store.campaign.results import CampaignResults

log = logging.getLogger(__name__)


def run_finish_campaign(
    context: Context, campaign_id: str, home: str, *, seized: bool = False
) -> CampaignResult | None:
    """End a campaign that is over, and leave nothing of it but its forks: its result.

    None for one that is not over: what is to be done of it is sent again. Raises Again while batches are still made,
    and when nothing is found of it. `seized`: all its holders were seen to be paused, so their batches are taken first.
    """
    if (known := known_campaign(context, campaign_id)) is not None:
        return known
    results = results_in(context, campaign_id)
    try:
        parent = context.roots.open_parent(home)
    except ForkError:
        raise RetryLater(None) from None
    with parent:
        try:
            with Staging.attach(parent.fd, campaign_id, LOCK_WAIT, alone=not seized) as staging:
                if staging is not None:
                    with staging.with_heartbeat():
                        return _conclude(context, results, staging, home, seized=seized)
        except Held as held:
            raise RetryLater(held.heartbeat) from None
        except (NotOurs, Malformed) as error:  # the campaign's own message gives each of its forks its end
            return None if _send_again(context, campaign_id) else _settle_unplanned(context, results, error)
        except OSError as error:  # a later try may be able to read it; otherwise `store_gone` ends the campaign
            log.warning("the staging of campaign %s cannot be read: %s", campaign_id, error)
            raise RetryLater(None) from None
    if (known := results.result()) is None and not _send_again(context, campaign_id):
        raise RetryLater(None)  # it may be about to be planned
    return known


def _send_again(context: Context, campaign_id: str) -> bool:
    """Send the request of a campaign that is not planned again; whether it was kept whole."""
    claim = context.results.claims.get(campaign_id)
    request = claim["request"]["kept"] if claim is not None else {}
    if "destinations" not in request:
        return False
    context.send(CAMPAIGN_TASK, {"request": request}, campaign_id)
    return True


def store_gone(context: Context, campaign_id: str) -> CampaignResult:
    """Settle a campaign whose staging was removed by others, or cannot be read."""
    spec, _ = _known_of(context, campaign_id)
    error = ForkError(Code.IO_ERROR, "its staging directory is gone or cannot be read", spec.source, errno.ENOENT)
    return _settle_unplanned(context, results_in(context, campaign_id), error)


def _conclude(
    context: Context, results: CampaignResults, staging: Staging, home: str, *, seized: bool
) -> CampaignResult | None:
    campaign = campaign_in(staging)
    if campaign is None:
        error = results.reason_to_end(home)
        if _send_again(context, results.campaign_id) or error is None:
            return None  # its own message plans it, or gives each of its forks its end
        result = _settle_unplanned(context, results, error)
    elif not is_over(results, campaign):
        send_batches(context, results, campaign, home)
        return None
    else:
        _end_rest(context, results, campaign, seized=seized)
        result = store_result(results, campaign.spec, _result(results, campaign))
        remove_annexes(campaign, context.roots)
    with suppress(OSError, ForkError):
        staging.remove()
    return result


def _end_rest(context: Context, results: CampaignResults, campaign: Campaign, *, seized: bool) -> None:
    count, batch = campaign.spec.aims.count, campaign.plan.batch
    if forks_done(results.sums()) >= count:
        return
    if seized:
        for first in range(0, count, batch):
            if not results.is_batch_done(first):
                with suppress(ForkError, OSError, Held):  # one that cannot be taken is refused or waited for below
                    seize_batch(campaign, context.roots, first)
    error = results.reason_to_end(campaign.spec.source)
    if error is not None:
        end_rest(campaign, context.roots, Ticker(_go_on), results, error)


def _result(results: CampaignResults, campaign: Campaign) -> CampaignResult:
    sums, failures = results.sums(), results.failures()
    error = None
    if sums.get("forks.cancelled"):
        error = results.reason_to_end(campaign.spec.source)
        if campaign.spec.aims.on_error == "abort" and failures:
            error = from_record(failures[0]["error"])
    return campaign_result(campaign.spec, sums, failures, planned_at=campaign.planned_at, error=error)


def _settle_unplanned(context: Context, results: CampaignResults, error: ForkError) -> CampaignResult:
    """End a campaign whose staging is of no use, with why it was to end, or else with `error`."""
    spec, paths = _known_of(context, results.campaign_id)
    return end_unplanned(results, spec, paths, results.reason_to_end(spec.source) or error)


def _known_of(context: Context, campaign_id: str) -> tuple[CampaignSpec, list[str]]:
    """What the claim on the id says of a campaign, and its destinations; none where the list was too long to keep."""
    claim = context.results.claims.get(campaign_id)
    if claim is None:
        return CampaignSpec(campaign_id=campaign_id, source=""), []
    summary: dict[str, Any] = claim["request"]
    with suppress(ForkError):
        return campaign_of(summary["kept"], campaign_id, owner="queue")
    aims = Aims(count=summary["forks"], start=summary["start"])
    return CampaignSpec(campaign_id=campaign_id, source=summary["kept"].get("source", ""), aims=aims), []


def _go_on(progress: Progress) -> None:
    """Nobody ends the end of a campaign."""
