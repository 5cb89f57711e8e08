"""`forkvm.campaign`: from a request to the batches that will make its forks."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import replace

from redis.exceptions import RedisError

from tasks.campaign.context import results_in
from tasks.campaign.lanes import send_batches
from tasks.cleanup import remove_leftovers
from tasks.context import LOCK_WAIT, Context, RetryLater
from tasks.contract.campaign_request import campaign_of, refused_campaign, summary_of
from tasks.copier.campaign.finish import not_started
from tasks.copier.campaign.plan import Campaign, campaign_in, find_home, open_campaign, plan_campaign
from tasks.copier.campaign.spec import CampaignResult, CampaignSpec, campaign_result
from tasks.copier.endpoints import open_endpoints
from tasks.copier.errors import Code, ForkError, from_oserror
from tasks.copier.fork.lifecycle import Superseded
from tasks.copier.progress import Beat, Progress, Ticker
from tasks.copier.staging import takeover
from tasks.copier.staging.control_directory import Held
from tasks.copier.staging.staging import Staging
from tasks.fork.foreign_ids import is_of_another_job
from tasks.store.campaign.fork_ids import expire_forks, free_fork_ids
from tasks.store.campaign.results import CampaignResults
from tasks.store.claims import Claim, reason_not_to_start

log = logging.getLogger(__name__)

#: Forks that are settled at a time where none of them is made.
_SLICE = 500


def run_campaign(
    context: Context, campaign_id: str, request: object, queued: float, *, expired: bool = False
) -> CampaignResult | None:
    """Begin a campaign, or continue one that was delivered before: its result, or None where other tasks give it.

    `queued` is how long the request waited, in seconds. `expired`: it is not to be begun any more, but continued where
    it was begun. Raises Again while another process plans it.
    """
    holder = context.results.claims.get(campaign_id)
    if is_of_another_job(context, campaign_id, holder):
        return None
    if (known := known_campaign(context, campaign_id)) is not None:
        if context.canvas is not None and _is_same(context.results.claims.get(campaign_id), request):
            context.keep_canvas(campaign_id)
        return known
    results = results_in(context, campaign_id)
    refusal: ForkError | None = None
    spec, paths, home = CampaignSpec(campaign_id=campaign_id, source=""), list[str](), ""
    try:
        clock = context.results.now
        wanted, destinations = campaign_of(request, campaign_id, owner="queue", queued=queued, clock=clock)
        free_fork_ids(context.results, wanted)
        spec, paths, home = wanted, destinations, destinations[0]
        home = find_home(context.roots, paths)
    except ForkError as error:
        refusal = error
    claimed = context.results.claims.take(
        campaign_id,
        {"request": summary_of(request, spec), "destination": home, "queue": context.queue, "campaign": True},
    )
    claim = claimed.holder
    if is_of_another_job(context, campaign_id, claim):
        return None
    if claim["request"] != summary_of(request, spec):
        log.warning("another request has the id %s already; this one is dropped", campaign_id)
        return None
    context.keep_canvas(campaign_id)
    if not paths and refusal is not None:
        return store_result(results, spec, refused_campaign(request, campaign_id, refusal))
    try:
        refusal = refusal or reason_not_to_start(claimed, spec.source, expired=expired)
        if refusal is not None:
            raise refusal
        _plan(context, results, spec, paths, claim["destination"])
        return results.result()
    except (ForkError, OSError) as error:
        return _refuse(results, spec, paths, error)
    except Held as held:
        raise RetryLater(held.heartbeat) from None
    except Superseded:
        return None


def _is_same(claim: Claim | None, request: object) -> bool:
    """Whether a claim was made for this request."""
    summary = summary_of(request, CampaignSpec(campaign_id="", source=""))
    return claim is None or claim["request"]["sha256"] == summary["sha256"]


def known_campaign(context: Context, campaign_id: str) -> CampaignResult | None:
    """The result of a campaign that has ended; what a process left that died before it had removed all is removed."""
    known = CampaignResults(context.results, campaign_id).result()
    claim = context.results.claims.get(campaign_id) if known is not None else None
    if claim is not None:
        remove_leftovers(context, campaign_id, claim["destination"])
    return known


def take_over_campaign(context: Context, campaign_id: str, heartbeat: int | None) -> None:
    """Take a campaign from a planner that gives no sign of life, so that it is planned anew.

    `heartbeat`: see `tasks.copier.staging.takeover`.
    """
    claim = context.results.claims.get(campaign_id)
    if claim is None:
        return
    with suppress(ForkError, OSError), context.roots.open_parent(claim["destination"]) as parent:
        takeover.take_over(parent.fd, campaign_id, heartbeat)


def store_result(results: CampaignResults, spec: CampaignSpec, result: CampaignResult) -> CampaignResult:
    """Keep the final result, let those of its forks expire with it, and put a line into the worker's log."""
    expire_forks(results.results, spec)  # first: its client may look for what is left as soon as it sees the result
    results.store_campaign_result(result)
    forks = ", ".join(f"{count} {name}" for name, count in result["forks"].items() if name != "total" and count)
    line = "campaign %s %s: %r, %d forks: %s, in %.3f s"
    values = (result["campaign_id"], result["status"], result["source"], result["forks"]["total"], forks or "none")
    log.info(line, *values, result["seconds"]["total"])
    return result


def _plan(context: Context, results: CampaignResults, spec: CampaignSpec, paths: list[str], home: str) -> None:
    with (
        open_endpoints(context.roots, spec.source, home) as ends,
        Staging.claim(ends.parent_fd, spec.campaign_id, LOCK_WAIT) as staging,
    ):
        if results.result() is not None:  # concluded while this delivery waited
            if staging.journal() is None:
                staging.remove()
            return
        planned = campaign_in(staging)
        if planned is None or not _is_asked_for(planned, spec, paths):
            try:
                if planned is not None:
                    results.delete_outcomes()
                elif results.sums() and results.reason_to_end(spec.source) is None:
                    raise ForkError(Code.IO_ERROR, "its staging directory was removed while it was made", home)
                with staging.with_heartbeat():
                    plan_campaign(ends, staging, spec, paths, Ticker(_look(results, spec)))
            except (ForkError, OSError) as error:
                if not staging.is_current():
                    raise Superseded from error
                _refuse(results, spec, paths, error)
                with suppress(OSError, ForkError):  # after that: a second delivery finds either the one or the other
                    staging.remove()
                return
    with open_campaign(context.roots, home, spec.campaign_id, LOCK_WAIT) as campaign:
        if campaign is not None:
            results.publish_progress(campaign.spec, results.sums(), campaign.planned_at)
            send_batches(context, results, campaign, home)


def _is_asked_for(planned: Campaign, spec: CampaignSpec, paths: list[str]) -> bool:
    """Whether what stands is the campaign that is asked for, and not an earlier one that Redis has forgotten.

    Raises ForkError where its list of destinations is damaged.
    """
    aims = replace(planned.spec.aims, deadline=spec.aims.deadline)
    same = replace(planned.spec, queued=spec.queued, started=spec.started, aims=aims) == spec
    return same and planned.destinations(0, spec.aims.count) == paths


def _look(results: CampaignResults, spec: CampaignSpec) -> Beat:
    def poll(progress: Progress) -> None:
        with suppress(RedisError):
            if error := results.reason_to_end(spec.source):
                raise error

    poll({"files_done": 0, "files_total": 0, "bytes_done": 0, "bytes_total": 0, "phase": "plan"})
    return poll


def _refuse(
    results: CampaignResults, spec: CampaignSpec, paths: list[str], cause: ForkError | OSError
) -> CampaignResult:
    """Settle a campaign that cannot be made, and each of its forks that has no result."""
    error = cause if isinstance(cause, ForkError) else from_oserror(cause, "making the staging directory", paths[0])
    return end_unplanned(results, spec, paths, error)


def end_unplanned(results: CampaignResults, spec: CampaignSpec, paths: list[str], error: ForkError) -> CampaignResult:
    """End a campaign without its staging, and each of its forks that has no result, with `error`.

    `paths`: the forks' destinations. A shorter list leaves those of the others empty: nobody knows them any more.
    """
    results.end_early(error)  # who goes on with this, should this process die, ends it with the same error
    count = spec.aims.count
    for first in range(0, count, _SLICE):
        open_ones = results.without_result(range(first, min(first + _SLICE, count)), spec)
        if open_ones:
            forks = {index: paths[index] if index < len(paths) else "" for index in open_ones}
            results.store_outcomes(open_ones[0], not_started(spec, forks, spec.started, error))
    sums = results.sums()
    refused = None if sums.get("forks.succeeded") == count else error  # all had ended well, which Redis forgot
    return store_result(results, spec, campaign_result(spec, sums, results.failures(), error=refused))
