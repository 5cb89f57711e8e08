"""`forkvm.bury`: ends a fork without trying it again, because too many processes died while they worked on it."""

from __future__ import annotations

from dataclasses import replace

from tasks.context import Context
from tasks.copier.endpoints import Endpoints
from tasks.copier.fork.chunk import worker_lost
from tasks.copier.fork.lifecycle import finish
from tasks.copier.fork_spec import ForkResult, ForkSpec
from tasks.copier.progress import Ticker
from tasks.copier.staging.control_directory import LOCK_WAIT
from tasks.copier.staging.journal import Phase
from tasks.copier.staging.staging import Staging
from tasks.delivery.outcome import outcome_of
from tasks.fork.ending import is_of_claim, store_failure, stored_result
from tasks.fork.takeover import store_published


def run_abandon(context: Context, fork_id: str, destination: str) -> ForkResult | None:
    """End a fork as worker_lost, unless it is published: its result. None if another process has taken it.

    Raises RetryLater while another process works on it.
    """
    if (known := stored_result(context, fork_id)) is not None:
        return known
    # If the staging is not the worker's own or cannot be read, it stays as it is.
    return outcome_of(lambda: _abandon(context, fork_id, destination), lambda _: _lost(context, fork_id, destination))


def _abandon(context: Context, fork_id: str, destination: str) -> ForkResult | None:
    with (
        context.roots.open_parent(destination) as parent,
        Staging.attach(parent.fd, fork_id, LOCK_WAIT, alone=True) as staging,
    ):
        if staging is None:
            return context.results.final.fork(fork_id) or _lost(context, fork_id, destination)
        if not is_of_claim(context, staging.own_journal(), fork_id, destination):
            return _lost(context, fork_id, destination)
        if store_published(context, fork_id, destination):
            return context.results.final.fork(fork_id)
        ends = Endpoints("", destination, -1, parent.fd, parent.name)
        return _give_up(context, staging, ends, fork_id) or _lost(context, fork_id, destination)


def _give_up(context: Context, staging: Staging, ends: Endpoints, fork_id: str) -> ForkResult | None:
    journal = staging.journal()
    if journal is not None and journal.phase is Phase.PUBLISHING:
        staging.write_journal(replace(journal, phase=Phase.CLONING))  # so that `finish` does not publish it
    source = ForkSpec.from_data(journal.spec).source if journal is not None else ""
    ledger = context.plain_ledger(fork_id)
    return finish(ends, staging, Ticker(lambda progress: None), ledger, worker_lost(source))


def _lost(context: Context, fork_id: str, destination: str) -> ForkResult:
    spec = ForkSpec(fork_id=fork_id, source="", destination=destination)
    return store_failure(context, spec, worker_lost(destination))
