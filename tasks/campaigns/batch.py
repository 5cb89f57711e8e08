"""`forkvm.batch`: some forks of a campaign, and then the next batch of its lane, or the campaign's end."""

from __future__ import annotations

from contextlib import suppress

from redis.exceptions import RedisError

from tasks.campaigns.lanes import is_over, send_batch
from tasks.campaigns.results import CampaignResults, results_in
from tasks.context import CONCLUDE_TASK, LOCK_WAIT, Again, Context
from tasks.copier.campaigns.batch import make_batch, seize_batch
from tasks.copier.campaigns.end import late
from tasks.copier.campaigns.plan import Campaign, open_campaign
from tasks.copier.control import Held
from tasks.copier.errors import ForkError
from tasks.copier.fork import Superseded
from tasks.copier.progress import Beat, Progress, Ticker


def run_batch(context: Context, campaign_id: str, home: str, first: int) -> None:
    """Make the batch that begins with the index `first` unless that is done.

    Raises Again while another process makes it, or holds the campaign to plan or to end it.
    """
    results = results_in(context, campaign_id)
    if context.results.claim_of(campaign_id) is None or results.result() is not None:
        return
    try:
        with open_campaign(context.roots, home, campaign_id, LOCK_WAIT) as campaign:
            over = campaign is None or _make(context, results, campaign, home, first)
    except Held as held:
        raise Again(held.pulse) from None
    except Superseded:
        return
    except ForkError:  # the home is gone: the campaign's end tells
        over = True
    if over:
        context.send(CONCLUDE_TASK, {"home": home}, campaign_id)


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
        with campaign.staging.beating():
            make_batch(campaign, context.roots, first, Ticker(_look(results, campaign)), results)
        following = first + campaign.plan.batch * campaign.plan.lanes
        if following < spec.aims.count:
            send_batch(context, spec.campaign_id, home, following)
        results.end_batch(first)  # after it was sent: who dies in between sends it once more, which does no harm
    with suppress(RedisError):
        results.tell(spec, results.sums(), campaign.planned_at)
    return is_over(results, campaign)


def _look(results: CampaignResults, campaign: Campaign) -> Beat:
    def look(progress: Progress) -> None:
        with suppress(RedisError):
            if error := results.ended(campaign.spec.source):
                raise error
            if error := late(campaign, results.results.now):
                raise error

    return look
