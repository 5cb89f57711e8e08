"""`forkvm.campaign`: from a request to the batches that will make its forks."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import replace
from typing import NamedTuple

from redis.exceptions import RedisError

from tasks.campaign.ending import end_without_plan, store_result, stored_result
from tasks.campaign.lanes import send_batches
from tasks.campaign.ledger import ledger_of
from tasks.context import Context
from tasks.contract.campaign_request import campaign_of, refused_campaign, summary_of
from tasks.copier.campaign.plan import Campaign, campaign_in, find_home, open_campaign, plan_campaign
from tasks.copier.campaign.spec import CampaignResult, CampaignSpec
from tasks.copier.endpoints import Endpoints, open_endpoints
from tasks.copier.errors import Code, ForkError, from_oserror
from tasks.copier.fork.completion import Superseded
from tasks.copier.progress import Poll, Progress, Ticker
from tasks.copier.staging.control_directory import LOCK_WAIT
from tasks.copier.staging.staging import Staging
from tasks.delivery.outcome import outcome_of
from tasks.fork.foreign_ids import is_of_another_job
from tasks.store.campaign.fork_ids import free_fork_ids
from tasks.store.campaign.results import CampaignResults
from tasks.store.claims import Claim, reason_not_to_start

log = logging.getLogger(__name__)


class _Wanted(NamedTuple):
    """What a request asks for, and why it is refused, if it is."""

    spec: CampaignSpec
    #: The destinations of the forks; empty if the request itself is wrong.
    paths: list[str]
    #: The first destination whose parent exists; the campaign's control directory is made beside it.
    home: str
    refusal: ForkError | None


def run_campaign(
    context: Context, campaign_id: str, request: object, queued: float, *, expired: bool = False
) -> CampaignResult | None:
    """Start a campaign, or continue one that was delivered before: its result, or None if other tasks will store it.

    `queued` is how long the request waited, in seconds. If it is `expired`, a campaign that no worker has begun is
    cancelled. Raises RetryLater while another process plans it.
    """
    if is_of_another_job(context, campaign_id, context.results.claims.get(campaign_id)):
        return None
    if (known := stored_result(context, campaign_id)) is not None:
        if context.canvas is not None and _is_same(context.results.claims.get(campaign_id), request):
            context.keep_canvas(campaign_id)
        return known
    wanted = _read(context, campaign_id, request, queued)
    summary = summary_of(request, wanted.spec)
    claimed = context.results.claims.take(
        campaign_id, {"request": summary, "destination": wanted.home, "queue": context.queue, "campaign": True}
    )
    claim = claimed.holder
    if is_of_another_job(context, campaign_id, claim):
        return None
    if claim["request"] != summary:
        log.warning("campaign %s: another request has this id already; this one is dropped", campaign_id)
        return None
    context.keep_canvas(campaign_id)
    results = ledger_of(context, campaign_id)
    spec, paths, refusal = wanted.spec, wanted.paths, wanted.refusal
    if not paths and refusal is not None:
        return store_result(results, spec, refused_campaign(request, campaign_id, refusal))
    refusal = refusal or reason_not_to_start(claimed, spec.source, expired=expired)
    if refusal is not None:
        return end_without_plan(results, spec, paths, refusal)
    return outcome_of(
        lambda: _start(context, results, spec, paths, claim["destination"]),
        lambda error: _fail(results, spec, paths, error),
    )


def _read(context: Context, campaign_id: str, request: object, queued: float) -> _Wanted:
    spec, paths, home = CampaignSpec(campaign_id=campaign_id, source=""), list[str](), ""
    try:
        asked, destinations = campaign_of(request, campaign_id, owner="queue", queued=queued, clock=context.results.now)
        free_fork_ids(context.results, asked)
        spec, paths, home = asked, destinations, destinations[0]
        home = find_home(context.roots, paths)
    except ForkError as error:
        return _Wanted(spec, paths, home, error)
    return _Wanted(spec, paths, home, None)


def _is_same(claim: Claim | None, request: object) -> bool:
    """Whether a claim was made for this request; true if there is none."""
    summary = summary_of(request, CampaignSpec(campaign_id="", source=""))
    return claim is None or claim["request"]["sha256"] == summary["sha256"]


def _start(
    context: Context, results: CampaignResults, spec: CampaignSpec, paths: list[str], home: str
) -> CampaignResult | None:
    """Plan the campaign unless that is done, and send its batches. Its result if it has ended meanwhile."""
    if not _send_planned(context, results, spec, paths, home) and _plan(context, results, spec, paths, home):
        _send_planned(context, results, spec, paths, home)
    return results.result()


def _send_planned(context: Context, results: CampaignResults, spec: CampaignSpec, paths: list[str], home: str) -> bool:
    """Send the batches of the campaign if it is planned.

    It is held shared, as by its batches. A paused batch would otherwise look like a planner that is to be replaced.
    """
    with open_campaign(context.roots, home, spec.campaign_id, LOCK_WAIT) as campaign:
        if campaign is None or not _is_planned_for(campaign, spec, paths):
            return False
        results.publish_progress(campaign.spec, results.sums(), campaign.planned_at)
        send_batches(context, results, campaign, home)
        return True


def _plan(context: Context, results: CampaignResults, spec: CampaignSpec, paths: list[str], home: str) -> bool:
    """Plan the campaign unless that is done. False if it has ended: before, or because it cannot be planned."""
    with (
        open_endpoints(context.roots, spec.source, home) as ends,
        Staging.claim(ends.parent_fd, spec.campaign_id, LOCK_WAIT) as staging,
    ):
        if results.result() is not None:  # another process ended it while this one waited for the staging
            if staging.journal() is None:
                staging.remove()
            return False
        planned = campaign_in(staging)
        if planned is not None and _is_planned_for(planned, spec, paths):
            return True
        try:
            _plan_in(staging, ends, results, spec, paths, is_replaced=planned is not None)
        except (ForkError, OSError) as error:
            if not staging.is_current():
                raise Superseded from error
            _fail(results, spec, paths, error)
            with suppress(OSError, ForkError):  # last: a second delivery finds the result or the staging
                staging.remove()
            return False
    return True


def _plan_in(
    staging: Staging,
    ends: Endpoints,
    results: CampaignResults,
    spec: CampaignSpec,
    paths: list[str],
    *,
    is_replaced: bool,
) -> None:
    """Make the plan. `is_replaced`: the staging holds the plan of an earlier campaign under this id."""
    if is_replaced:
        results.delete_outcomes()
    elif results.sums() and results.reason_to_end(spec.source) is None:
        message = "its staging directory was removed while its forks were made"
        raise ForkError(Code.IO_ERROR, message, ends.destination)
    with staging.with_heartbeat():
        plan_campaign(ends, staging, spec, paths, Ticker(_poll_end(results, spec)))


def _is_planned_for(planned: Campaign, spec: CampaignSpec, paths: list[str]) -> bool:
    """Whether a plan belongs to this request, and not to an earlier one under its id that Redis has lost.

    Raises ForkError if the plan's list of destinations is damaged.
    """
    aims = replace(planned.spec.aims, deadline=spec.aims.deadline)
    same = replace(planned.spec, queued=spec.queued, started=spec.started, aims=aims) == spec
    return same and planned.destinations(0, spec.aims.count) == paths


def _poll_end(results: CampaignResults, spec: CampaignSpec) -> Poll:
    """A function that raises the error with which the campaign is to end early; it is called once at the start."""

    def poll(progress: Progress) -> None:
        with suppress(RedisError):
            if error := results.reason_to_end(spec.source):
                raise error

    poll({"files_done": 0, "files_total": 0, "bytes_done": 0, "bytes_total": 0, "phase": "plan"})
    return poll


def _fail(results: CampaignResults, spec: CampaignSpec, paths: list[str], cause: ForkError | OSError) -> CampaignResult:
    """End a campaign that cannot be made."""
    error = cause if isinstance(cause, ForkError) else from_oserror(cause, "making the staging directory", paths[0])
    return end_without_plan(results, spec, paths, error)
