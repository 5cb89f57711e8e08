"""`forkvm.finish`: the end of a fork that was done in chunks, or of one that someone ended."""

from __future__ import annotations

import errno
import os
import time

from tasks.context import LOCK_WAIT, Again, Context, ForkLedger, cancelled
from tasks.copier.ends import Ends, reopen_ends
from tasks.copier.errors import Code, ForkError
from tasks.copier.fork import finish
from tasks.copier.plan import Plan
from tasks.copier.progress import Ticker
from tasks.copier.report import Totals
from tasks.copier.spec import Clock, ForkResult, ForkSpec, failed
from tasks.copier.staging import Staging


def run_finish(context: Context, fork_id: str, destination: str) -> ForkResult | None:
    """Publish a fork whose chunks are done, or remove one that failed or was cancelled: its result.

    None while chunks are still to be done. Raises Again while other processes work on the fork.
    """
    known = context.results.result(fork_id)
    if known is not None:
        return known
    try:
        parent_fd, name = context.roots.open_parent(destination)
    except ForkError as error:
        return _lost(context, fork_id, destination, error)
    try:
        if context.results.is_cancelled(fork_id):
            Staging.stop_from_outside(parent_fd, fork_id)
        with Staging.attach(parent_fd, fork_id, LOCK_WAIT, alone=True) as staging:
            if staging is not None:
                return _finish(context, fork_id, staging, Ends("", destination, -1, parent_fd, name))
    except TimeoutError:
        raise Again from None
    finally:
        os.close(parent_fd)
    gone = ForkError(Code.IO_ERROR, "its staging directory is gone", destination, errno.ENOENT)
    return context.results.result(fork_id) or _lost(context, fork_id, destination, gone)


def _finish(context: Context, fork_id: str, staging: Staging, ends: Ends) -> ForkResult | None:
    """`ends` has no source yet: the journal tells which it is."""
    ledger = ForkLedger(context.results, fork_id)
    ticker = Ticker(context.beat(fork_id, "close", ends.destination))
    abort = cancelled(ends.destination) if staging.is_stopped() else None
    journal = staging.journal()
    if abort is None and journal is not None and journal.plan is not None:
        spec, plan = ForkSpec.from_data(journal.spec), Plan.from_data(journal.plan)
        try:
            with reopen_ends(context.roots, spec.source, spec.destination, plan.top.ino) as both:
                return finish(both, staging, ticker, ledger)
        except ForkError as error:
            abort = error
    return finish(ends, staging, ticker, ledger, abort)


def _lost(context: Context, fork_id: str, destination: str, error: ForkError) -> ForkResult:
    """Settle a fork of which nothing can be found any more."""
    spec = ForkSpec(fork_id=fork_id, source="", destination=destination, started=time.time())
    result = failed(spec, error, Totals(), 0, Clock(spec.started))
    ForkLedger(context.results, fork_id).settle(result)
    return result
