"""`forkvm.fork`: from a request to a result, or to the chunks that will make one."""

from __future__ import annotations

import logging
from typing import cast

from tasks.context import LOCK_WAIT, Context, ForkLedger, RetryLater
from tasks.contract import fork_request
from tasks.copier.endpoints import open_endpoints
from tasks.copier.errors import ForkError, cancelled, from_oserror
from tasks.copier.fork.early_chunks import EarlyChunks
from tasks.copier.fork.lifecycle import Superseded, start
from tasks.copier.fork.plan import Plan
from tasks.copier.fork_spec import ForkResult, ForkSpec
from tasks.copier.kernel import trees
from tasks.copier.progress import Cancellation, Ticker
from tasks.copier.staging.control_directory import Held
from tasks.copier.staging.staging import Staging
from tasks.fork.finish import end_with, publish_again, refuse, store_ended
from tasks.fork.foreign_ids import is_of_another_job
from tasks.names import CHUNK_TASK
from tasks.store.claims import Claim, reason_not_to_start

log = logging.getLogger(__name__)


def run_fork(
    context: Context, fork_id: str, request: object, queued: float, *, expired: bool = False
) -> ForkResult | None:
    """Begin a fork, or continue one that was delivered before: its result, or None where other tasks will give it.

    `queued` is how long the request waited, in seconds. `expired`: it is not to be begun any more, but continued where
    it was begun. Raises Again while another process holds the fork.
    """
    destination = fork_request.text_of(request, "destination")
    claim: Claim = {"request": request, "destination": destination, "queue": context.queue}
    if is_of_another_job(context, fork_id, None):
        return None
    claimed = context.results.claims.take(fork_id, claim)
    if is_of_another_job(context, fork_id, claimed.holder):
        return None
    if claimed.holder["request"] == request:
        context.keep_canvas(fork_id)  # before the result is looked for again: who ends the fork meanwhile sees it
    if claimed.result is not None:
        return publish_again(context, cast(ForkResult, claimed.result))
    if claimed.holder["request"] != request:
        log.warning("another request has the id %s already; this one is dropped", fork_id)
        return None
    try:
        spec = fork_request.spec_of(request, fork_id, owner="queue", queued=queued)
    except ForkError as error:
        result = fork_request.refused(request, fork_id, error)
        ForkLedger(context.results, fork_id).store_result(result)
        return result
    if (refusal := reason_not_to_start(claimed, spec.destination, expired=expired)) is not None:
        return refuse(context, spec, refusal)
    try:
        return _start(context, spec)
    except ForkError as error:
        return end_with(context, spec, error)
    except Held as held:
        raise RetryLater(held.heartbeat) from None
    except Superseded:
        return None
    except OSError as error:
        return end_with(context, spec, from_oserror(error, "making the staging directory", spec.destination))


def _start(context: Context, spec: ForkSpec) -> ForkResult | None:
    ticker = Ticker(context.beat(spec.fork_id, "plan", spec.destination))
    with (
        open_endpoints(context.roots, spec.source, spec.destination) as ends,
        Staging.claim(ends.parent_fd, spec.fork_id, LOCK_WAIT) as staging,
    ):
        fresh = staging.journal() is None
        known, cancellation = context.results.final.status(spec.fork_id)  # another delivery may have ended it since
        if fresh and known is None and trees.identity_of(ends.parent_fd, ends.name) is not None:
            known = store_ended(context, spec)  # Redis may have forgotten it
        if known is not None or (fresh and cancellation is Cancellation.REQUESTED):
            if fresh:
                staging.remove()
            return known or refuse(context, spec, cancelled(spec.destination))
        with staging.with_heartbeat():
            ledger = context.ledger(spec, ends.parent_fd, ends.name)
            outcome = start(ends, staging, spec, context.limits, ticker, ledger, lambda work: EarlyChunks(work, ticker))
        if not isinstance(outcome, Plan):
            return outcome
        context.publish_progress(spec.fork_id, "plan", ticker.progress)
        missing = [n for n in range(len(outcome.chunks)) if not staging.has_report(str(n))]
    for number in missing or [0]:  # none missing: chunk 0, delivered again, sends the fork to its finish
        kwargs = {"fork_id": spec.fork_id, "destination": spec.destination, "number": number}
        context.send(CHUNK_TASK, kwargs, f"{spec.fork_id}.chunk.{number}")
    return None
