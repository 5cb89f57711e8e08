"""`forkvm.finish`: publishes a fork whose chunks are done, or ends one that failed or was cancelled."""

from __future__ import annotations

from tasks.context import Context
from tasks.copier.endpoints import Endpoints, reopen_endpoints
from tasks.copier.errors import Code, ForkError, cancelled, from_oserror
from tasks.copier.fork.lifecycle import finish
from tasks.copier.fork.plan import Plan
from tasks.copier.fork_spec import ForkResult, ForkSpec
from tasks.copier.progress import Ticker
from tasks.copier.staging.control_directory import LOCK_WAIT
from tasks.copier.staging.staging import Staging
from tasks.delivery.outcome import RetryLater, open_parent_or_retry, outcome_of
from tasks.fork.ending import end_fork, is_of_claim, restore_result, spec_from_claim, store_failure, stored_result


def run_finish(context: Context, fork_id: str, destination: str) -> ForkResult | None:
    """Publish a fork whose chunks are done, or remove one that failed or was cancelled: its result.

    None while chunks are still to be done. Raises RetryLater while other processes work on the fork, and if nothing is
    found of it.
    """
    if (known := stored_result(context, fork_id)) is not None:
        return known
    is_cancelled = context.results.cancellations.is_requested(fork_id)

    def fail(error: ForkError | OSError) -> ForkResult | None:
        if isinstance(error, OSError):  # the staging cannot be read now, but perhaps when the fork is ended
            failure = from_oserror(error, "working in the staging directory", destination)
        else:  # the staging is damaged or is not the worker's own
            failure = cancelled(destination) if is_cancelled else error
        return end_fork(context, spec_from_claim(context, fork_id, destination), failure)

    return outcome_of(lambda: _finish(context, fork_id, destination, is_cancelled=is_cancelled), fail)


def _finish(context: Context, fork_id: str, destination: str, *, is_cancelled: bool) -> ForkResult | None:
    with open_parent_or_retry(context.roots, destination) as parent:
        if is_cancelled:
            Staging.stop_from_outside(parent.fd, fork_id)
        with Staging.attach(parent.fd, fork_id, LOCK_WAIT, alone=True) as staging:
            if staging is not None:
                with staging.with_heartbeat():
                    ends = Endpoints("", destination, -1, parent.fd, parent.name)  # the journal knows the source
                    return _finish_staging(context, fork_id, staging, ends, is_cancelled=is_cancelled)
    spec = spec_from_claim(context, fork_id, destination)
    known = context.results.final.fork(fork_id) or restore_result(context, spec)
    if known is None:
        raise RetryLater(None)  # another task may be about to make the staging
    return known


def _finish_staging(
    context: Context, fork_id: str, staging: Staging, ends: Endpoints, *, is_cancelled: bool
) -> ForkResult | None:
    claimed = spec_from_claim(context, fork_id, ends.destination)
    ledger = context.ledger(claimed, ends.parent_fd, ends.name)
    ticker = Ticker(context.poll_of(fork_id, "close", ends.destination))
    if not is_cancelled and staging.is_stopped():  # perhaps by a chunk that saw a later cancellation
        is_cancelled = context.results.cancellations.is_requested(fork_id)
    abort = _abort_reason(staging, ends.destination, is_cancelled=is_cancelled)
    journal = staging.journal()
    if not is_of_claim(context, journal, fork_id, ends.destination):
        # It belongs to an earlier request under this id, which Redis has lost. The request that it knows starts again.
        return store_failure(context, claimed, cancelled(ends.destination)) if is_cancelled else None
    if abort is None and journal is not None and journal.plan is not None:
        spec, plan = ForkSpec.from_data(journal.spec), Plan.from_data(journal.plan)
        try:
            with reopen_endpoints(context.roots, spec.source, spec.destination, plan.top.ino) as both:
                return finish(both, staging, ticker, ledger)
        except ForkError as error:
            abort = error
    result = finish(ends, staging, ticker, ledger, abort)
    if result is None and is_cancelled and journal is None:  # the planning process died before it wrote anything
        return store_failure(context, claimed, cancelled(ends.destination))
    return result


def _abort_reason(staging: Staging, destination: str, *, is_cancelled: bool) -> ForkError | None:
    """Why the fork is not to be published; None if it is, or if the report of a failed chunk will say why."""
    if is_cancelled:
        return cancelled(destination)
    if staging.is_stopped():  # a chunk's report goes first; this is for a chunk that failed and could not write one
        return ForkError(Code.IO_ERROR, "a chunk failed and could not write its report", destination)
    return None
