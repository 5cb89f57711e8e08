"""The results of one campaign, for its tasks. They are also the ledger that the engine writes outcomes of forks to."""

from __future__ import annotations

from tasks.context import Context
from tasks.store.campaign.results import CampaignResults
from tasks.store.recent_forks.campaign_forks import RecentCampaignForks


def ledger_of(context: Context, campaign_id: str) -> CampaignResults:
    """The results of a campaign, with the notes on this host about forks that ended."""
    return CampaignResults(context.results, campaign_id, RecentCampaignForks(context.recent_forks, context.roots))
