"""Notes about the forks of campaigns."""

from __future__ import annotations

import os
from dataclasses import dataclass

from tasks.copier.campaign.batch_record import Outcome
from tasks.copier.fork_spec import ForkSpec
from tasks.copier.roots import Roots
from tasks.store.recent_forks.forks import ALL_PAGES, RecentForks, number_of
from tasks.store.results import Results


@dataclass(frozen=True)
class RecentCampaignForks:
    """The notes of this host about campaigns' forks that succeeded."""

    forks: RecentForks
    roots: Roots

    def corrected_outcomes(self, results: Results, campaign_id: str, outcomes: list[Outcome]) -> list[Outcome]:
        """The outcomes, but the earlier one of each fork that failed now, had succeeded before, and is still there.

        Writes notes about the forks that succeeded now. Raises RedisError.
        """
        claim = results.claims.get(campaign_id)
        if claim is None or not claim.get("campaign"):
            return outcomes
        digest: str = claim["request"]["sha256"]
        self.forks.note_run(self.roots, campaign_id, digest, outcomes)
        taken = {
            number_of(result): ForkSpec(
                fork_id=result["fork_id"], source=result["source"], destination=result["destination"]
            )
            for result in (outcome.result for outcome in outcomes)
            if result["error"] is not None and os.path.lexists(result["destination"])  # a hint: it saves reading
        }
        found = self.forks.find_run(self.roots, campaign_id, digest, taken).values()
        earlier = {fork.result["fork_id"]: Outcome(fork.result, fork.pages.get(ALL_PAGES, [])) for fork in found}
        return [earlier.get(outcome.result["fork_id"], outcome) for outcome in outcomes]
