"""The end of a fork, whichever task ends it: its result is stored, and its staging is removed.

Every task of a fork may be delivered again after the fork has ended, and Redis may have lost the result. A failure is
therefore stored only if the fork has no result yet (`stored_result`) and did not succeed earlier (`restore_result`).
"""

from __future__ import annotations

import logging
from contextlib import suppress

from tasks.cleanup import remove_leftovers
from tasks.context import Context
from tasks.contract import fork_request
from tasks.copier.endpoints import Endpoints
from tasks.copier.errors import ForkError
from tasks.copier.fork.lifecycle import finish
from tasks.copier.fork_spec import Clock, ForkResult, ForkSpec, failed
from tasks.copier.progress import Ticker
from tasks.copier.report import Totals
from tasks.copier.roots import normal_path
from tasks.copier.staging.control_directory import LOCK_WAIT
from tasks.copier.staging.journal import Journal
from tasks.copier.staging.staging import Staging
from tasks.delivery.outcome import outcome_of
from tasks.store.recent_forks.forks import ALL_PAGES

log = logging.getLogger(__name__)


def stored_result(context: Context, fork_id: str) -> ForkResult | None:
    """The result of a fork that has ended, or None. Removes what a process left that died after it stored it."""
    result = context.results.final.fork(fork_id)
    if result is not None:
        remove_leftovers_of(context, result)
    return result


def remove_leftovers_of(context: Context, result: ForkResult) -> None:
    """Remove what is left of a fork that has this result."""
    if "fork_id" in result:  # or it is the result of a campaign whose id a client used for a fork, too
        remove_leftovers(context, result["fork_id"], result["destination"])


def end_fork(context: Context, spec: ForkSpec, error: ForkError) -> ForkResult | None:
    """End a fork that cannot continue, with `error`, and remove what earlier deliveries made of it.

    Returns its result, or None if another process has taken the fork. Raises RetryLater while others work on it.
    """
    return outcome_of(
        lambda: _end_with_staging(context, spec, error),
        # The staging is not the worker's own or cannot be read. Another chunk may have ended the fork for that reason.
        lambda _: _stored_or_failed(context, spec, error),
    )


def _end_with_staging(context: Context, spec: ForkSpec, error: ForkError) -> ForkResult | None:
    with (
        context.roots.open_parent(spec.destination) as parent,
        Staging.attach(parent.fd, spec.fork_id, LOCK_WAIT, alone=True) as staging,
    ):
        if staging is not None and is_of_claim(context, staging.journal(), spec.fork_id, spec.destination):
            ends = Endpoints(spec.source, spec.destination, -1, parent.fd, parent.name)
            ticker = Ticker(context.poll_of(spec.fork_id, "close", spec.destination))
            result = finish(ends, staging, ticker, context.ledger(spec, parent.fd, parent.name), error)
            return result or store_failure(context, spec, error)
    return _stored_or_failed(context, spec, error)


def _stored_or_failed(context: Context, spec: ForkSpec, error: ForkError) -> ForkResult:
    return context.results.final.fork(spec.fork_id) or store_failure(context, spec, error)


def store_failure(context: Context, spec: ForkSpec, error: ForkError) -> ForkResult:
    """Store the failure of a fork that made nothing; or its success, if it succeeded and Redis lost that."""
    if (restored := restore_result(context, spec)) is not None:
        return restored
    result = failed(spec, error, Totals(), 0, Clock(spec.started))
    ledger = context.plain_ledger(spec.fork_id)
    with suppress(ForkError):  # FileResults of an earlier attempt whose staging is gone do not belong to this result
        ledger.keep_all_pages([])
    ledger.store_result(result)
    return result


def restore_result(context: Context, spec: ForkSpec) -> ForkResult | None:
    """Store the result of a fork that succeeded and whose result Redis lost. None if no such fork is noted here.

    The note is of use only while the published directory is at its destination; see `tasks.store.recent_forks`.
    """
    ended = context.recent_forks.find(context.roots, spec)
    if ended is None:
        return None
    log.warning("fork %s succeeded earlier, but Redis lost its result; it is stored again", spec.fork_id)
    ledger = context.plain_ledger(spec.fork_id)
    with suppress(ForkError):  # Redis is full and refuses the FileResults
        if ALL_PAGES in ended.pages:
            ledger.keep_all_pages(ended.pages[ALL_PAGES])
        elif ended.pages:
            ledger.keep_pages(ended.pages)
    ledger.store_result(ended.result)
    return ended.result


def spec_from_claim(context: Context, fork_id: str, destination: str) -> ForkSpec:
    """The fork as the request that holds the id describes it. Without one, only its id and destination are known."""
    claim = context.results.claims.get(fork_id)
    if claim is not None:
        with suppress(ForkError):
            return fork_request.spec_of(claim["request"], fork_id, owner="queue")
    return ForkSpec(fork_id=fork_id, source="", destination=destination)


def is_of_claim(context: Context, journal: Journal | None, fork_id: str, destination: str) -> bool:
    """Whether a journal belongs to the request that holds the id; if none holds it, whether the destination matches.

    True without a journal. After Redis has lost its data, a client may send an id again for another request. Raises
    ForkError for a damaged journal.
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
