"""`forkvm.finish`: the end of a fork that was done in chunks, or of one that someone ended."""

from __future__ import annotations

import logging
from contextlib import suppress

from tasks.cleanup import remove_leftovers
from tasks.context import LOCK_WAIT, Context, ForkLedger, RetryLater
from tasks.contract import fork_request
from tasks.copier.endpoints import Endpoints, reopen_endpoints
from tasks.copier.errors import Code, ForkError, cancelled, from_oserror
from tasks.copier.fork.lifecycle import Superseded, finish
from tasks.copier.fork.plan import Plan
from tasks.copier.fork_spec import Clock, ForkResult, ForkSpec, failed
from tasks.copier.progress import Ticker
from tasks.copier.report import Totals
from tasks.copier.roots import normal_path
from tasks.copier.staging.control_directory import Held
from tasks.copier.staging.journal import Journal
from tasks.copier.staging.staging import Staging
from tasks.store.recent_forks.forks import ALL_PAGES

log = logging.getLogger(__name__)


def run_finish(context: Context, fork_id: str, destination: str) -> ForkResult | None:
    """Publish a fork whose chunks are done, or remove one that failed or was cancelled: its result.

    None while chunks are still to be done. Raises Again while other processes work on the fork, and when nothing is
    found of it.
    """
    known = known_result(context, fork_id)
    if known is not None:
        return known
    try:
        parent = context.roots.open_parent(destination)
    except ForkError:
        raise RetryLater(None) from None
    is_cancelled = False
    with parent:
        try:
            is_cancelled = context.results.cancellations.is_requested(fork_id)
            if is_cancelled:
                Staging.stop_from_outside(parent.fd, fork_id)
            with Staging.attach(parent.fd, fork_id, LOCK_WAIT, alone=True) as staging:
                if staging is not None:
                    with staging.with_heartbeat():
                        ends = Endpoints("", destination, -1, parent.fd, parent.name)
                        return _finish(context, fork_id, staging, ends, is_cancelled=is_cancelled)
        except Held as held:
            raise RetryLater(held.heartbeat) from None
        except Superseded:
            return None
        except ForkError as error:  # what stands in the staging's place is not ours, or damaged
            failure = cancelled(destination) if is_cancelled else error
            return end_with(context, unknown_spec(context, fork_id, destination), failure)
        except OSError as error:  # the staging cannot be read: perhaps it can for the end
            failure = from_oserror(error, "working in the staging directory", destination)
            return end_with(context, unknown_spec(context, fork_id, destination), failure)
    known = context.results.final.fork(fork_id) or store_ended(context, unknown_spec(context, fork_id, destination))
    if known is None:
        raise RetryLater(None)  # it may be about to be made anew
    return known


def known_result(context: Context, fork_id: str) -> ForkResult | None:
    """The result of a fork that has ended, or None: see `publish_again`."""
    known = context.results.final.fork(fork_id)
    return publish_again(context, known) if known is not None else None


def publish_again(context: Context, known: ForkResult) -> ForkResult:
    """The result of a fork that has ended; what a process left that died between the result and its end is removed."""
    if "fork_id" in known:  # or it is a campaign's, whose id the client gave to a fork as well
        remove_leftovers(context, known["fork_id"], known["destination"])
    return known


def _finish(
    context: Context, fork_id: str, staging: Staging, ends: Endpoints, *, is_cancelled: bool
) -> ForkResult | None:
    """`ends` has no source yet: the journal tells which it is."""
    ledger = context.ledger(unknown_spec(context, fork_id, ends.destination), ends.parent_fd, ends.name)
    ticker = Ticker(context.beat(fork_id, "close", ends.destination))
    abort = None
    if is_cancelled:
        abort = cancelled(ends.destination)
    elif staging.is_stopped():  # a part that failed left its report, which goes first; this is for one that could not
        abort = ForkError(Code.IO_ERROR, "a part of it failed and could not say why", ends.destination)
    journal = staging.journal()
    if not is_asked_for(context, journal, fork_id, ends.destination):
        # Of an earlier request under this id, which Redis has forgotten: the one that it knows begins anew.
        unknown = unknown_spec(context, fork_id, ends.destination)
        return refuse(context, unknown, cancelled(ends.destination)) if is_cancelled else None
    if abort is None and journal is not None and journal.plan is not None:
        spec, plan = ForkSpec.from_data(journal.spec), Plan.from_data(journal.plan)
        try:
            with reopen_endpoints(context.roots, spec.source, spec.destination, plan.top.ino) as both:
                return finish(both, staging, ticker, ledger)
        except ForkError as error:
            abort = error
    ended = finish(ends, staging, ticker, ledger, abort)
    if ended is None and is_cancelled and journal is None:  # its planner died before it wrote anything
        return refuse(context, unknown_spec(context, fork_id, ends.destination), cancelled(ends.destination))
    return ended


def unknown_spec(context: Context, fork_id: str, destination: str) -> ForkSpec:
    """A fork of which the staging does not tell what it is: as the request says that holds the id, if one does."""
    claim = context.results.claims.get(fork_id)
    if claim is not None:
        with suppress(ForkError):
            return fork_request.spec_of(claim["request"], fork_id, owner="queue")
    return ForkSpec(fork_id=fork_id, source="", destination=destination)


def is_asked_for(context: Context, journal: Journal | None, fork_id: str, destination: str) -> bool:
    """Whether a journal is of the request that holds the id, and for this destination; also where none is known.

    After Redis has lost its data, a client may send an id again for another request. Raises ForkError.
    """
    if journal is None:
        return True
    if journal.is_campaign:
        return False
    spec = ForkSpec.from_data(journal.spec)
    claim = context.results.claims.get(fork_id)
    if claim is None:
        return spec.destination == normal_path(destination, "destination")
    with suppress(ForkError):
        return fork_request.spec_of(claim["request"], fork_id, owner="queue").is_same_request(spec)
    return False


def end_with(context: Context, spec: ForkSpec, error: ForkError) -> ForkResult | None:
    """End a fork that cannot be gone on with: what an earlier delivery made of it is removed.

    Its result, or None when it was taken from this process. Raises Again.
    """
    try:
        with (
            context.roots.open_parent(spec.destination) as parent,
            Staging.attach(parent.fd, spec.fork_id, LOCK_WAIT, alone=True) as staging,
        ):
            if staging is not None and is_asked_for(context, staging.journal(), spec.fork_id, spec.destination):
                ends = Endpoints(spec.source, spec.destination, -1, parent.fd, parent.name)
                ticker = Ticker(context.beat(spec.fork_id, "close", spec.destination))
                ended = finish(ends, staging, ticker, context.ledger(spec, parent.fd, parent.name), error)
                return ended or refuse(context, spec, error)
    except Held as held:
        raise RetryLater(held.heartbeat) from None
    except Superseded:
        return None
    except (ForkError, OSError):
        # What is there is not ours, or cannot be read; another chunk may have settled the fork for that.
        return context.results.final.fork(spec.fork_id) or refuse(context, spec, error)
    return context.results.final.fork(spec.fork_id) or refuse(context, spec, error)


def refuse(context: Context, spec: ForkSpec, error: ForkError) -> ForkResult:
    """Settle a fork that was not begun; or that ended well, which Redis has forgotten, with the result of then."""
    if (ended := store_ended(context, spec)) is not None:
        return ended
    result = failed(spec, error, Totals(), 0, Clock(spec.started))
    ledger = ForkLedger(context.results, spec.fork_id)
    with suppress(ForkError):  # FileResults of an earlier attempt whose staging is gone are no part of this result
        ledger.keep_all_pages([])
    ledger.store_result(result)
    return result


def store_ended(context: Context, spec: ForkSpec) -> ForkResult | None:
    """Settle a fork that ended well and that Redis has forgotten, if it is at its destination: its result, or None."""
    ended = context.recent_forks.find(context.roots, spec)
    if ended is None:
        return None
    log.warning("fork %s ended before, which Redis has forgotten: its result is kept again", spec.fork_id)
    ledger = ForkLedger(context.results, spec.fork_id)
    with suppress(ForkError):  # a full Redis takes no FileResults
        if ALL_PAGES in ended.pages:
            ledger.keep_all_pages(ended.pages[ALL_PAGES])
        elif ended.pages:
            ledger.keep_pages(ended.pages)
    ledger.store_result(ended.result)
    return ended.result
