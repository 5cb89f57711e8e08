"""`forkvm.fork`: from a request to a result, or to the chunks that will make the fork."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from functools import partial
from typing import cast

from tasks.context import Context
from tasks.contract import fork_request
from tasks.contract.raw_request import text_of
from tasks.copier.endpoints import open_endpoints
from tasks.copier.errors import ForkError, cancelled, from_oserror
from tasks.copier.fork.completion import CompleteFork
from tasks.copier.fork.early_chunks import EarlyChunks
from tasks.copier.fork.lifecycle import begin
from tasks.copier.fork.plan import Plan
from tasks.copier.fork_spec import ForkResult, ForkSpec
from tasks.copier.kernel import trees
from tasks.copier.progress import Cancellation, Ticker
from tasks.copier.staging.control_directory import LOCK_WAIT
from tasks.copier.staging.staging import Staging
from tasks.delivery.outcome import outcome_of
from tasks.fork.chunk import send_chunks
from tasks.fork.ending import end_fork, remove_leftovers_of, restore_result, store_failure
from tasks.fork.foreign_ids import is_of_another_job
from tasks.store.claims import Claim, ClaimOutcome, reason_not_to_start

log = logging.getLogger(__name__)


def run_fork(
    context: Context, fork_id: str, request: object, queued: float, *, expired: bool = False
) -> ForkResult | None:
    """Start a fork, or continue one that was delivered before: its result, or None if other tasks will store it.

    `queued` is how long the request waited, in seconds. If it is `expired`, a fork that no worker has begun is
    cancelled. Raises RetryLater while another process holds the fork.
    """
    destination = text_of(request, "destination")
    claim: Claim = {"request": request, "destination": destination, "queue": context.queue}
    if is_of_another_job(context, fork_id, None):
        return None
    claimed = context.results.claims.take(fork_id, claim)
    if is_of_another_job(context, fork_id, claimed.holder):
        return None
    if claimed.holder["request"] == request:
        context.keep_canvas(fork_id)  # before the fork can end: the task that ends it sends what follows
    if claimed.result is not None:
        result = cast(ForkResult, claimed.result)
        remove_leftovers_of(context, result)
        return result
    if claimed.holder["request"] != request:
        log.warning("fork %s: another request has this id already; this one is dropped", fork_id)
        return None
    return run_claimed(context, fork_id, request, queued, claimed, expired=expired)


def run_claimed(
    context: Context,
    fork_id: str,
    request: object,
    queued: float,
    claimed: ClaimOutcome,
    *,
    expired: bool = False,
) -> ForkResult | None:
    """As `run_fork`, for a request that holds its id and whose fork has no result."""
    try:
        spec = fork_request.spec_of(request, fork_id, owner="queue", queued=queued)
    except ForkError as error:
        result = fork_request.refused(request, fork_id, error)
        context.plain_ledger(fork_id).store_result(result)
        return result
    if (refusal := reason_not_to_start(claimed, spec.destination, expired=expired)) is not None:
        return store_failure(context, spec, refusal)

    def fail(error: ForkError | OSError) -> ForkResult | None:
        if isinstance(error, OSError):
            error = from_oserror(error, "making the staging directory", spec.destination)
        return end_fork(context, spec, error)

    return outcome_of(lambda: _start(context, spec, claimed), fail)


def _start(context: Context, spec: ForkSpec, claimed: ClaimOutcome) -> ForkResult | None:
    """Make the whole fork if it is small: its result. Else plan it, send its chunks, and return None."""
    ticker = Ticker(context.poll_of(spec.fork_id, "plan", spec.destination), context.pace)
    with ExitStack() as opened:
        ends = opened.enter_context(open_endpoints(context.roots, spec.source, spec.destination))
        staging = opened.enter_context(Staging.claim(ends.parent_fd, spec.fork_id, LOCK_WAIT))
        is_new = staging.journal() is None
        known, cancellation = None, claimed.cancellation
        if not claimed.is_new:  # another delivery may have ended it
            known, cancellation = context.results.final.status(spec.fork_id)
        if is_new and known is None and trees.identity_of(ends.parent_fd, ends.name) is not None:
            known = restore_result(context, spec)
        if known is not None or (is_new and cancellation is Cancellation.REQUESTED):
            if is_new:
                staging.remove()
            return known or store_failure(context, spec, cancelled(spec.destination))
        opened.enter_context(staging.with_heartbeat())
        ledger = context.ledger(spec, ends.parent_fd, ends.name)
        early = partial(EarlyChunks, ticker=ticker)
        outcome = begin(ends, staging, spec, context.limits, ticker, ledger, early)
        if isinstance(outcome, CompleteFork):
            context.complete_forks.add(outcome, ledger, opened.pop_all())
            ended = context.ended.get(spec.fork_id)
            return ended.result if ended is not None else None
        if not isinstance(outcome, Plan):
            return outcome
        context.publish_progress(spec.fork_id, "plan", ticker.progress)
        missing = [n for n in range(len(outcome.chunks)) if not staging.has_report(str(n))]
    send_chunks(context, spec, missing or [0])  # if all are done, a repeated chunk 0 sends the finish
    return None
