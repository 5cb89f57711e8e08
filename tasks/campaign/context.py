"""The results of one campaign, for the tasks of it."""

from __future__ import annotations

from tasks.context import Context
from tasks.store.campaign.results import CampaignResults
from tasks.store.recent_forks.campaign_forks import RecentCampaignForks


def results_in(context: Context, campaign_id: str) -> CampaignResults:
    """The results of a campaign, for a task that may settle its forks."""
    return CampaignResults(context.results, campaign_id, RecentCampaignForks(context.recent_forks, context.roots))
