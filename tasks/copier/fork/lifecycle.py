"""A fork from its start to its end, in steps that any process may take up where another one died.

`start` plans, and does all of a small fork; `finish` closes and publishes one whose chunks are done. Both are called
with the staging held exclusively, and may be called again for the same fork at any moment: they look at the journal
first. Where the fork ends, its result is settled in the ledger before the staging goes, so that a second delivery of
the request finds either the one or the other.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, cast

from tasks.copier.clone.file import Cloner
from tasks.copier.endpoints import Endpoints, destination_exists
from tasks.copier.errors import Code, ForkError, cancelled, from_oserror, from_record
from tasks.copier.fork.chunk import MAX_TRIES, run_chunk, worker_lost
from tasks.copier.fork.close import close_tree
from tasks.copier.fork.plan import Crew, Plan, make_plan
from tasks.copier.fork.snapshot import snapshot_tree
from tasks.copier.fork_spec import Clock, ForkResult, ForkSpec, failed, result_of, succeeded
from tasks.copier.kernel import syscalls, trees
from tasks.copier.options import Limits
from tasks.copier.progress import Cancellation, Ticker
from tasks.copier.report import Report, Totals
from tasks.copier.staging.journal import Journal, Phase
from tasks.copier.staging.proof import NotOurs
from tasks.copier.staging.publishing import cannot_publish, require_noreplace
from tasks.copier.staging.staging import Staging
from tasks.copier.staging.workspace import Workspace, open_work
from tasks.copier.validation import Malformed

log = logging.getLogger(__name__)

#: How often a removal is tried: a call that failed once may work the next time.
_REMOVE_TRIES = 3


class Superseded(Exception):
    """The fork was taken from this process while it was paused, or its staging was removed: the end is not its to tell.

    See `tasks.copier.staging.takeover`.
    """


class Ledger(Protocol):
    """Where a fork's results are kept for those who asked for it."""

    def keep_pages(self, parts: dict[str, list[bytes]], *, anew: bool = False) -> Cancellation:
        """Keep the FileResults of parts of the fork (a chunk's number, `plan` or `close`). Raises ForkError.

        `anew`: in place of all that was kept before, by an earlier attempt. Returns whether the
        cancellation of the fork was requested.
        """

    def keep_all_pages(self, pages: list[bytes]) -> Cancellation:
        """As `keep_pages`, of a fork without parts: in place of all that was kept before."""

    def store_result(self, result: ForkResult) -> None:
        """Keep the final result. When this returns, a second delivery of the request will find it."""


#: Makes the crew for one attempt at a fork.
Gather = Callable[[Workspace], Crew]


@dataclass
class _Account:
    """What is known of a fork while it is made, for its result, whichever that will be."""

    spec: ForkSpec
    clock: Clock
    journal: Journal | None = None
    chunks: int = 0
    #: Whether each part keeps its own FileResults, being done by a task of its own.
    in_parts: bool = False
    reports: dict[str, Report] = field(default_factory=dict)

    def parts(self) -> list[str]:
        """The parts whose FileResults may be in the ledger."""
        plan = self.journal.plan if self.journal is not None else None
        chunks = self.chunks if plan is None else len(plan["chunks"])
        return ["plan", "close", *map(str, range(chunks))]

    def totals(self) -> Totals:
        totals = Totals()
        for report in self.reports.values():
            totals.add(report.totals)
        return totals


def start(
    ends: Endpoints,
    staging: Staging,
    spec: ForkSpec,
    limits: Limits,
    ticker: Ticker,
    ledger: Ledger,
    gather: Gather | None = None,
) -> ForkResult | Plan:
    """Begin or resume a fork: its result where all is done, else the plan whose chunks are to be run.

    `gather` makes a crew that begins with chunks while the source is still being walked. Never raises ForkError: a
    failure is a result.
    """
    account = _Account(spec, Clock(spec.started))
    outcome: ForkResult | Plan
    try:
        journal = account.journal = _journal_of(staging, spec)
        if journal is not None and journal.phase is Phase.PUBLISHING:
            outcome = _publish_again(ends, staging, journal, spec)
        elif journal is None or journal.plan is None:
            outcome = _start_anew(ends, staging, account, limits, ticker, ledger, gather)
        else:
            outcome = Plan.from_data(journal.plan)
    except Exception as error:
        return _give_up(ends, staging, account, error, ledger)
    return outcome if isinstance(outcome, Plan) else _settle(staging, outcome, ledger)


def finish(
    ends: Endpoints, staging: Staging, ticker: Ticker, ledger: Ledger, abort: ForkError | None = None
) -> ForkResult | None:
    """Close and publish a fork whose chunks are done, or give it up: its result, or None while chunks are missing.

    `abort` gives it up in any case, unless it is published. A failure is a result; raises ForkError only where the
    staging does not tell which fork it is of.
    """
    journal = staging.own_journal()
    if journal is None:
        staging.discard_noted_trees()
        staging.remove()  # its planner died before it wrote anything
        return None
    try:
        spec = ForkSpec.from_data(journal.spec)
    except ForkError:
        _insist(partial(staging.discard_tree, journal))
        _insist(staging.remove)
        raise
    account = _Account(spec, Clock(spec.started, planned=journal.planned_at), journal)
    try:
        if journal.phase is Phase.PUBLISHING:
            result = _publish_again(ends, staging, journal, spec)
        else:
            plan = Plan.from_data(journal.plan) if journal.plan is not None else None
            if plan is not None:
                account.chunks, account.in_parts = len(plan.chunks), True
                account.reports = _reports(staging, plan)
                account.clock.cloned = time.time()
            _raise_failure(account.reports)
            if abort is not None:
                raise abort
            if plan is None or len(account.reports) < len(plan.chunks) + 1:
                return None
            if journal.closings >= MAX_TRIES:
                raise worker_lost(spec.source)
            journal = account.journal = replace(journal, closings=journal.closings + 1)
            staging.write_journal(journal)
            with open_work(ends, staging, spec.options, staging.open_tree(journal)) as work:
                result = _close_and_publish(work, plan, account, ticker, ledger)
    except Exception as error:
        return _give_up(ends, staging, account, error, ledger)
    return _settle(staging, result, ledger)


def _journal_of(staging: Staging, spec: ForkSpec) -> Journal | None:
    """The journal of this very request, or None: what another request under its id left is removed.

    A client may send an id again, for another request, after Redis has lost its data. A fork that was published for the
    earlier one stays where it is.
    """
    journal = staging.own_journal()
    if journal is None:
        return None
    with suppress(ForkError):
        if not journal.is_campaign and ForkSpec.from_data(journal.spec).is_same_request(spec):
            return journal
    log.warning("the staging of %r is of another request under its id; it is begun anew", spec.destination)
    staging.discard_all_of(journal)
    return None


def _start_anew(
    ends: Endpoints,
    staging: Staging,
    account: _Account,
    limits: Limits,
    ticker: Ticker,
    ledger: Ledger,
    gather: Gather | None,
) -> ForkResult | Plan:
    spec = account.spec
    if account.journal is not None and account.journal.tries >= MAX_TRIES:
        raise worker_lost(spec.source)
    ends.refuse_existing()
    journal = account.journal = staging.begin(spec.to_data(), account.journal)
    require_noreplace(staging.fd, spec.destination)
    with open_work(ends, staging, spec.options, staging.make_tree(journal)) as work:
        began = time.time()
        snapshot = snapshot_tree(work, staging, staging.tree_name(journal), ticker)
        if snapshot is not None:
            account.reports["plan"] = snapshot.report
            account.clock.planned, account.clock.cloned = began, time.time()
            with open_work(ends, staging, spec.options, snapshot.fd) as work:
                return _complete_and_publish(work, account, ticker, ledger, subvolume=True)
        cloner = Cloner(spec.options, {}, ticker.step)
        planned = account.reports["plan"] = Report()
        crew = gather(work) if gather is not None else None
        try:
            plan = make_plan(work, limits, cloner, ticker, planned, crew)
            planned.totals.fallback = cloner.fallback
            planned.totals.move_losses_from(cloner.metadata.losses)
            account.chunks = len(plan.chunks)
            account.clock.planned = time.time()
            if not plan.inline:
                _take_in_done(staging, account, crew)
                ledger.keep_pages({part: report.close() for part, report in account.reports.items()}, anew=True)
                account.in_parts = True
                staging.write_report("plan", planned)
                staging.write_journal(
                    replace(
                        journal,
                        phase=Phase.CLONING,
                        tree=trees.identity(work.tree_fd),
                        plan=plan.to_data(),
                        planned_at=account.clock.planned,
                    )
                )
                return plan
        except BaseException:
            if crew is not None:
                crew.dismiss()  # before the tree is removed
            raise
        for number, chunk in enumerate(plan.chunks):
            account.reports[str(number)] = run_chunk(work, plan, chunk, cloner, ticker)
        _raise_failure(account.reports)
        account.clock.cloned = time.time()
        account.journal = replace(journal, plan=plan.to_data())
        return _close_and_publish(work, plan, account, ticker, ledger)


def _take_in_done(staging: Staging, account: _Account, crew: Crew | None) -> None:
    """Take in what the crew did of the plan while it was made. Raises the ForkError of a chunk that failed."""
    for number in crew.walk_ended() if crew is not None else ():
        if staging.has_report(str(number)):
            account.reports[str(number)] = staging.report(str(number))
    _raise_failure(account.reports)


def _close_and_publish(work: Workspace, plan: Plan, account: _Account, ticker: Ticker, ledger: Ledger) -> ForkResult:
    spec = account.spec
    refused = {(src, dst): number for src, dst, number in plan.refused}
    cloner = Cloner(spec.options, refused, ticker.step)
    ticker.enter("publish", plan.entries, plan.bytes)
    again = account.journal is not None and account.journal.closings > 1
    account.reports["close"] = close_tree(work, plan, account.reports, cloner, ticker, replaces=again)
    return _complete_and_publish(work, account, ticker, ledger)


def _complete_and_publish(
    work: Workspace, account: _Account, ticker: Ticker, ledger: Ledger, *, subvolume: bool = False
) -> ForkResult:
    """Publish the closed tree, after its results are kept and all that the rename makes true is in the journal."""
    spec, journal, staging = account.spec, cast(Journal, account.journal), work.staging
    if _keep_pages(account, ledger) is Cancellation.REQUESTED:
        raise cancelled(spec.destination)
    sync = spec.options.durability == "sync"
    if sync:
        syscalls.syncfs(work.tree_fd)
    result = succeeded(spec, account.totals(), account.chunks, account.clock, subvolume=subvolume)
    journal = replace(
        journal,
        phase=Phase.PUBLISHING,
        tree=trees.identity(work.tree_fd),
        result=cast(dict[str, Any], result),
    )
    ticker.poll()  # a local fork's ledger tells of no end, and a sync takes its time
    staging.write_journal(journal, sync=sync)
    account.journal = journal
    return _publish(work.ends, staging, journal, spec, result)


def _publish_again(ends: Endpoints, staging: Staging, journal: Journal, spec: ForkSpec) -> ForkResult:
    """Publish the complete tree that the journal identifies, unless that is done: its result. Raises ForkError."""
    return _publish(ends, staging, journal, spec, result_of(journal.result, spec))


def _publish(ends: Endpoints, staging: Staging, journal: Journal, spec: ForkSpec, result: ForkResult) -> ForkResult:
    """Publish the complete tree unless that is done: the result that is true from then on."""
    sync = spec.options.durability == "sync"
    if staging.is_published(journal, ends.name):
        if sync:
            os.fsync(ends.parent_fd)  # who renamed it may have died before
    else:
        try:
            staging.publish(journal, ends.name, sync=sync)
        except FileExistsError:
            raise destination_exists(ends.destination) from None
        except FileNotFoundError as error:
            message = "the finished fork is gone: it was moved or removed by someone else"
            raise ForkError(Code.IO_ERROR, message, ends.destination, error.errno) from None
        except OSError as error:
            raise cannot_publish(error, ends.destination) from None
    return result


def _settle(staging: Staging, result: ForkResult, ledger: Ledger) -> ForkResult:
    """Settle the result of a published fork, and remove the staging.

    What fails here is raised: the fork stands, and must not be given up. A later delivery settles it.
    """
    ledger.store_result(result)
    _insist(staging.remove)
    return result


def _give_up(ends: Endpoints, staging: Staging, account: _Account, cause: Exception, ledger: Ledger) -> ForkResult:
    """Remove all that was made, and settle the failure. Raises Superseded."""
    if not staging.is_current():
        raise Superseded from cause
    error = _as_fork_error(cause, ends)
    if account.journal is not None:
        _insist(partial(staging.discard_tree, account.journal))
    with suppress(ForkError):
        _keep_pages(account, ledger, [part for part in account.parts() if part not in account.reports])  # of who died
    result = failed(account.spec, error, account.totals(), account.chunks, account.clock)
    ledger.store_result(result)
    if account.journal is not None or not isinstance(cause, NotOurs):
        _insist(staging.remove)
    return result


def _as_fork_error(cause: Exception, ends: Endpoints) -> ForkError:
    if isinstance(cause, ForkError):
        return cause
    if isinstance(cause, OSError):
        return from_oserror(cause, "working in the staging directory", ends.destination)
    # An error in this program is a failed fork too: it must leave nothing, and nobody waiting.
    log.error("unexpected error while making %r", ends.destination, exc_info=cause)
    return ForkError(Code.IO_ERROR, f"unexpected {type(cause).__name__}: {cause}", ends.destination)


def _insist(remove: Callable[[], None]) -> None:
    """Remove what a fork that is over leaves; what cannot be removed in a few tries, gc removes later."""
    for _ in range(_REMOVE_TRIES):
        with suppress(OSError, ForkError):
            remove()
            return


def _keep_pages(account: _Account, ledger: Ledger, undone: Iterable[str] = ()) -> Cancellation:
    """Keep the FileResults of all parts that are not in the ledger yet; parts that are `undone` have none.

    Returns whether the cancellation of the fork was requested.
    """
    if not account.in_parts:
        return ledger.keep_all_pages(Report.pages_of(account.reports.values()))
    pages: dict[str, list[bytes]] = {part: [] for part in undone}
    pages |= {part: report.close() for part, report in account.reports.items() if report.has_pages()}
    return ledger.keep_pages(pages)


def _reports(staging: Staging, plan: Plan) -> dict[str, Report]:
    """The reports that are there, without their pages: those are in the ledger already."""
    if not staging.has_report("plan"):  # it was written before the plan: nobody would write it again
        raise Malformed("the report of its planning is gone")
    parts = ["plan", *map(str, range(len(plan.chunks)))]
    return {part: staging.report(part).without_pages() for part in parts if staging.has_report(part)}


def _raise_failure(reports: dict[str, Report]) -> None:
    for report in reports.values():
        if report.totals.error is not None:
            raise from_record(report.totals.error)
