"""`forkvm.batch`: makes some forks of a campaign, then sends the next batch of its lane, or the campaign's end."""

from __future__ import annotations

from contextlib import suppress

from redis.exceptions import RedisError

from tasks.campaign.lanes import is_over, send_batch
from tasks.campaign.ledger import ledger_of
from tasks.context import Context
from tasks.copier.campaign.batch import first_of_runs, make_batch
from tasks.copier.campaign.finish import late
from tasks.copier.campaign.plan import Campaign, open_campaign
from tasks.copier.errors import ForkError
from tasks.copier.progress import Poll, Progress, Ticker
from tasks.copier.staging.control_directory import LOCK_WAIT
from tasks.delivery.outcome import RetryLater, outcome_of
from tasks.names import FINISH_CAMPAIGN_TASK
from tasks.store.campaign.results import CampaignResults


def run_batch(context: Context, campaign_id: str, home: str, first: int) -> None:
    """Make the batch that begins with the index `first`, unless that is done.

    Raises RetryLater while another process makes it, or holds the campaign to plan or to end it, and if Redis has lost
    its results.
    """
    results = ledger_of(context, campaign_id)
    if context.results.claims.get(campaign_id) is None or results.result() is not None:
        return

    def work() -> bool:
        with open_campaign(context.roots, home, campaign_id, LOCK_WAIT) as campaign:
            return campaign is None or _make(context, results, campaign, home, first)

    def fail(error: ForkError | OSError) -> bool:
        if isinstance(error, OSError):  # a fault of this process, not of the campaign: the batch is delivered again
            raise error
        return True  # the home cannot be opened: the campaign's end says why

    if outcome_of(work, fail):
        context.send(FINISH_CAMPAIGN_TASK, {"home": home}, campaign_id)


def _make(context: Context, results: CampaignResults, campaign: Campaign, home: str, first: int) -> bool:
    """Make the batch, and send the next one of its lane. Returns whether the campaign is over."""
    spec = campaign.spec
    if not results.is_batch_done(first):
        if is_over(results, campaign):
            return True
        with campaign.staging.with_heartbeat():
            ticker = Ticker(_poll_end(results, campaign), context.pace)
            make_batch(campaign, context.roots, first, ticker, results)
        following = first + campaign.plan.batch * campaign.plan.lanes
        if following < spec.aims.count:
            send_batch(context, spec.campaign_id, home, following)
        # After the send: a process that dies in between sends it twice, which does no harm.
        if not results.end_batch(first, first_of_runs(campaign, first)) and not is_over(results, campaign):
            raise RetryLater(None)  # Redis has lost the results of this batch
    with suppress(RedisError):
        results.publish_progress(spec, results.sums(), campaign.planned_at)
    return is_over(results, campaign)


def _poll_end(results: CampaignResults, campaign: Campaign) -> Poll:
    """A function that raises the error with which the campaign is to end early."""

    def poll(progress: Progress) -> None:
        with suppress(RedisError):
            if error := results.reason_to_end(campaign.spec.source):
                raise error
            if error := late(campaign, results.results.now):
                raise error

    return poll
