"""Forks of campaigns that have ended and whose end Redis has forgotten; see `tasks.store.ended`."""

from __future__ import annotations

import os
from dataclasses import dataclass

from tasks.copier.campaign.batch_record import Outcome
from tasks.copier.fork_spec import ForkSpec
from tasks.copier.roots import Roots
from tasks.store.ended import ALL_PAGES, EndedForks, number_of
from tasks.store.results import Results


@dataclass(frozen=True)
class EndedRuns:
    """What this host's workers noted of campaigns' forks that ended well."""

    forks: EndedForks
    roots: Roots

    def true_outcomes(self, results: Results, campaign_id: str, outcomes: list[Outcome]) -> list[Outcome]:
        """The same outcomes, but of failed forks that ended well before, and are there, those of then.

        Those that succeeded now are noted.
        """
        claim = results.claim_of(campaign_id)
        if claim is None or not claim.get("campaign"):
            return outcomes
        digest: str = claim["request"]["sha256"]
        self.forks.note_run(self.roots, campaign_id, digest, outcomes)
        taken = {
            number_of(result): ForkSpec(
                fork_id=result["fork_id"], source=result["source"], destination=result["destination"]
            )
            for result in (outcome.result for outcome in outcomes)
            if result["error"] is not None and os.path.lexists(result["destination"])  # only a hint: it saves reading
        }
        ended = self.forks.run(self.roots, campaign_id, digest, taken)
        if not ended:
            return outcomes
        found = {then.result["fork_id"]: Outcome(then.result, then.pages.get(ALL_PAGES, [])) for then in ended.values()}
        return [found.get(outcome.result["fork_id"], outcome) for outcome in outcomes]
