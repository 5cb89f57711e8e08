"""The end of a campaign, whichever task ends it: its result is stored, even if the campaign has no usable plan."""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import Any

from tasks.campaign.ledger import ledger_of
from tasks.cleanup import remove_leftovers
from tasks.context import Context
from tasks.contract.campaign_request import campaign_of
from tasks.copier.campaign.finish import named_destination, not_started
from tasks.copier.campaign.spec import Aims, CampaignResult, CampaignSpec, campaign_result
from tasks.copier.counted import counted
from tasks.copier.errors import ForkError
from tasks.store.campaign.fork_ids import expire_forks
from tasks.store.campaign.results import CampaignResults

log = logging.getLogger(__name__)

#: The outcomes of forks that were not started are stored in runs of so many forks.
_RUN = 500


def stored_result(context: Context, campaign_id: str) -> CampaignResult | None:
    """The result of a campaign that has ended, or None. Removes what a process left that died after it stored it."""
    result = CampaignResults(context.results, campaign_id).result()
    claim = context.results.claims.get(campaign_id) if result is not None else None
    if claim is not None:
        remove_leftovers(context, campaign_id, claim["destination"])
    return result


def store_result(results: CampaignResults, spec: CampaignSpec, result: CampaignResult) -> CampaignResult:
    """Store the final result, let the results of the forks expire with it, and log it."""
    expire_forks(results.results, spec)  # first: the client may check for leftovers as soon as it sees the result
    results.store_campaign_result(result)
    forks = ", ".join(f"{count} {name}" for name, count in result["forks"].items() if name != "total" and count)
    line = "campaign %s %s: %r, %s: %s, in %.3f s"
    total = counted(result["forks"]["total"], "fork")
    values = (result["campaign_id"], result["status"], result["source"], total, forks or "none")
    log.info(line, *values, result["seconds"]["total"])
    return result


def end_without_plan(
    results: CampaignResults, spec: CampaignSpec, paths: list[str], error: ForkError
) -> CampaignResult:
    """End a campaign that has no usable staging: every fork without a result fails with `error`.

    `paths` are the destinations of the forks. If the list is too short, the results of the other forks have an empty
    destination, since it is no longer known.
    """
    results.end_early(error)  # if this process dies, the next one ends the campaign with the same error
    results.close()  # a batch may be made without this staging: it was moved away, or another one was put in its place
    count, home = spec.aims.count, named_destination(error, paths)
    for first in range(0, count, _RUN):
        open_ones = results.without_result(range(first, min(first + _RUN, count)), spec)
        if open_ones:
            forks = {index: paths[index] if index < len(paths) else "" for index in open_ones}
            results.store_outcomes(open_ones[0], not_started(spec, forks, spec.started, error, home), ends=True)
    sums = results.sums()
    all_succeeded = sums.get("forks.succeeded") == count  # they ended before, and Redis had lost that
    failure = None if all_succeeded else error
    return store_result(results, spec, campaign_result(spec, sums, results.failures(), error=failure))


def end_from_claim(context: Context, campaign_id: str, error: ForkError) -> CampaignResult:
    """End a campaign without its staging, from what the claim on its id says of it.

    The forks fail with the reason for which the campaign was to end, or else with `error`.
    """
    results = ledger_of(context, campaign_id)
    spec, paths = claimed_campaign(context, campaign_id)
    return end_without_plan(results, spec, paths, results.reason_to_end(spec.source) or error)


def claimed_campaign(context: Context, campaign_id: str) -> tuple[CampaignSpec, list[str]]:
    """The campaign as the claim on its id describes it, and its destinations; none if the list was too long to keep."""
    claim = context.results.claims.get(campaign_id)
    if claim is None:
        return CampaignSpec(campaign_id=campaign_id, source=""), []
    summary: dict[str, Any] = claim["request"]
    with suppress(ForkError):
        return campaign_of(summary["kept"], campaign_id, owner="queue")
    aims = Aims(count=summary["forks"], start=summary["start"])
    return CampaignSpec(campaign_id=campaign_id, source=summary["kept"].get("source", ""), aims=aims), []
