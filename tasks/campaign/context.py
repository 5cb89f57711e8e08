"""The results of one campaign, for the tasks of it."""

from __future__ import annotations

from tasks.context import Context
from tasks.store.campaign_results import CampaignResults
from tasks.store.ended_campaigns import EndedRuns


def results_in(context: Context, campaign_id: str) -> CampaignResults:
    """The results of a campaign, for a task that may settle its forks."""
    return CampaignResults(context.results, campaign_id, EndedRuns(context.ended, context.roots))
