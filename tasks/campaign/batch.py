"""`forkvm.batch`: some forks of a campaign, and then the next batch of its lane, or the campaign's end."""

from __future__ import annotations

from contextlib import suppress

from redis.exceptions import RedisError

from tasks.campaign.context import results_in
from tasks.campaign.lanes import is_over, send_batch
from tasks.context import LOCK_WAIT, Context, RetryLater
from tasks.copier.campaign.batch import make_batch, seize_batch
from tasks.copier.campaign.finish import late
from tasks.copier.campaign.plan import Campaign, open_campaign
from tasks.copier.errors import ForkError
from tasks.copier.fork.lifecycle import Superseded
from tasks.copier.progress import Beat, Progress, Ticker
from tasks.copier.staging.control_directory import Held
from tasks.names import FINISH_CAMPAIGN_TASK
from tasks.store.campaign.results import CampaignResults


def run_batch(context: Context, campaign_id: str, home: str, first: int) -> None:
    """Make the batch that begins with the index `first` unless that is done.

    Raises Again while another process makes it, or holds the campaign to plan or to end it.
    """
    results = results_in(context, campaign_id)
    if context.results.claims.get(campaign_id) is None or results.result() is not None:
        return
    try:
        with open_campaign(context.roots, home, campaign_id, LOCK_WAIT) as campaign:
            over = campaign is None or _make(context, results, campaign, home, first)
    except Held as held:
        raise RetryLater(held.heartbeat) from None
    except Superseded:
        return
    except ForkError:  # the home is gone: the campaign's end tells
        over = True
    if over:
        context.send(FINISH_CAMPAIGN_TASK, {"home": home}, campaign_id)


def take_over_batch(context: Context, campaign_id: str, home: str, first: int) -> bool:
    """Take the batch from a holder that gives no sign of life; whether there was one to take it from."""
    try:
        with open_campaign(context.roots, home, campaign_id, LOCK_WAIT) as campaign:
            if campaign is None:
                return False
            seize_batch(campaign, context.roots, first)
            return True
    except (Held, ForkError, OSError):
        return False


def _make(context: Context, results: CampaignResults, campaign: Campaign, home: str, first: int) -> bool:
    """Make the batch, and send the next one of its lane; whether the campaign is over."""
    spec = campaign.spec
    if not results.is_batch_done(first):
        if is_over(results, campaign):
            return True
        with campaign.staging.with_heartbeat():
            make_batch(campaign, context.roots, first, Ticker(_look(results, campaign)), results)
        following = first + campaign.plan.batch * campaign.plan.lanes
        if following < spec.aims.count:
            send_batch(context, spec.campaign_id, home, following)
        results.end_batch(first)  # after it was sent: who dies in between sends it once more, which does no harm
    with suppress(RedisError):
        results.publish_progress(spec, results.sums(), campaign.planned_at)
    return is_over(results, campaign)


def _look(results: CampaignResults, campaign: Campaign) -> Beat:
    def poll(progress: Progress) -> None:
        with suppress(RedisError):
            if error := results.reason_to_end(campaign.spec.source):
                raise error
            if error := late(campaign, results.results.now):
                raise error

    return poll
