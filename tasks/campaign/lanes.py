"""Which batches of a campaign are in the queue: one of each lane, so that there is room for what others send.

A lane is a sequence of batches. The task that has made one batch sends the next one of its lane.
"""

from __future__ import annotations

from tasks.context import Context
from tasks.copier.campaign.finish import aborted, late
from tasks.copier.campaign.plan import Campaign
from tasks.copier.campaign.spec import forks_done
from tasks.names import BATCH_TASK, FINISH_CAMPAIGN_TASK
from tasks.store.campaign.results import CampaignResults


def send_batches(context: Context, results: CampaignResults, campaign: Campaign, home: str) -> None:
    """Send the first batch of each lane that is not done; or the campaign's end if the campaign is over."""
    if is_over(results, campaign):
        context.send(FINISH_CAMPAIGN_TASK, {"home": home}, campaign.spec.campaign_id)
        return
    stride = campaign.plan.batch * campaign.plan.lanes
    for lane in range(campaign.plan.lanes):
        for first in range(lane * campaign.plan.batch, campaign.spec.aims.count, stride):
            if not results.is_batch_done(first):
                send_batch(context, campaign.spec.campaign_id, home, first)
                break


def send_batch(context: Context, campaign_id: str, home: str, first: int) -> None:
    """Send the batch that begins with the index `first`."""
    arguments = {"campaign_id": campaign_id, "home": home, "first": first}
    context.send(BATCH_TASK, arguments, f"{campaign_id}.batch.{first}")


def is_over(results: CampaignResults, campaign: Campaign) -> bool:
    """Whether no further fork is to be started. Stores the reason for an early end once it is known."""
    spec, sums = campaign.spec, results.sums()
    all_ended = forks_done(sums) >= spec.aims.count
    if all_ended and not sums.get("forks.cancelled"):
        return True
    if sums.get("forks.failed") and spec.aims.on_error == "abort":
        results.end_early(aborted(campaign))
    elif error := late(campaign, results.results.now):
        results.end_early(error)
    return all_ended or results.reason_to_end(campaign.spec.source) is not None
