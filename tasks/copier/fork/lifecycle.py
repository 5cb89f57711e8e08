"""A fork from its start to its end, in steps that another process can repeat when one dies.

`start` plans a fork, and completes a small one. `finish` closes and publishes a fork whose chunks are done. Both are
called with the staging held exclusively, and both may be called again for the same fork at any moment: they read the
journal first. At the end of a fork its result is stored in the ledger before the staging is removed, so a second
delivery of the request always finds one of the two.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial

from tasks.copier.clone.file import Cloner
from tasks.copier.endpoints import Endpoints
from tasks.copier.errors import Code, ForkError
from tasks.copier.fork.attempt import Attempt, Ledger
from tasks.copier.fork.chunk import MAX_TRIES, run_chunk, worker_lost
from tasks.copier.fork.close import close_tree
from tasks.copier.fork.completion import CompleteFork, abandon, complete, try_to_remove
from tasks.copier.fork.plan import EarlyWorkers, Plan, make_plan
from tasks.copier.fork.snapshot import snapshot_tree
from tasks.copier.fork_spec import Clock, ForkResult, ForkSpec
from tasks.copier.kernel import trees
from tasks.copier.options import Limits
from tasks.copier.progress import Ticker
from tasks.copier.report import Report
from tasks.copier.space.budget import budget_of
from tasks.copier.space.reservation import job_of
from tasks.copier.space.room import Room
from tasks.copier.staging.journal import Journal, Phase
from tasks.copier.staging.publishing import require_noreplace
from tasks.copier.staging.staging import Staging
from tasks.copier.staging.workspace import KeptManifests, Workspace, open_work
from tasks.copier.validation import Malformed

log = logging.getLogger(__name__)


#: Creates the workers that begin with the chunks of one attempt while its source is still walked.
StartEarly = Callable[[Workspace], EarlyWorkers | None]


def start(
    ends: Endpoints,
    staging: Staging,
    spec: ForkSpec,
    limits: Limits,
    ticker: Ticker,
    ledger: Ledger,
    start_early: StartEarly | None = None,
) -> ForkResult | Plan:
    """Begin or resume a fork. Returns its result if all of it is done, else the plan whose chunks are to be run.

    `start_early` creates the workers that begin with chunks while the source is still walked. Never raises ForkError: a
    failure is a result. Raises Superseded.
    """
    outcome = begin(ends, staging, spec, limits, ticker, ledger, start_early)
    return outcome.end() if isinstance(outcome, CompleteFork) else outcome


def begin(
    ends: Endpoints,
    staging: Staging,
    spec: ForkSpec,
    limits: Limits,
    ticker: Ticker,
    ledger: Ledger,
    start_early: StartEarly | None = None,
) -> ForkResult | Plan | CompleteFork:
    """As `start`, but a small fork is not published. The caller does that with others, or calls its `end`."""
    attempt = Attempt(ends, staging, ticker, ledger, spec, Clock(spec.started))
    outcome: Plan | CompleteFork
    try:
        journal = attempt.journal = _journal_of(staging, spec)
        if journal is not None and journal.phase is Phase.PUBLISHING:
            outcome = CompleteFork(attempt)
        elif journal is None or journal.plan is None:
            outcome = _begin(attempt, limits, start_early)
        else:
            outcome = Plan.from_data(journal.plan)
    except Exception as error:
        return abandon(attempt, error)
    return outcome.end() if isinstance(outcome, CompleteFork) and not attempt.alone else outcome


def finish(
    ends: Endpoints, staging: Staging, ticker: Ticker, ledger: Ledger, abort: ForkError | None = None
) -> ForkResult | None:
    """Close and publish a fork whose chunks are done. Returns its result, or None while chunks are missing.

    `abort` abandons the fork instead, unless it is published. A failure is a result; ForkError is raised only if the
    staging does not say which fork it belongs to. Raises Superseded.
    """
    journal = staging.own_journal()
    if journal is None:
        staging.discard_noted_trees()
        staging.remove()  # its planner died before it wrote a journal
        return None
    spec = _spec_in(staging, journal)
    clock = Clock(spec.started, planned=journal.planned_at)
    attempt = Attempt(ends, staging, ticker, ledger, spec, clock, journal)
    try:
        if journal.phase is Phase.PUBLISHING:
            fork = CompleteFork(attempt)
        else:
            plan = _read_reports(attempt, journal, abort)
            if plan is None:
                return None
            fork = _close(attempt, journal, plan)
    except Exception as error:
        return abandon(attempt, error)
    return fork.end()


# -- start


def _journal_of(staging: Staging, spec: ForkSpec) -> Journal | None:
    """The journal of this request, or None. What another request with the same id left is removed.

    A client may reuse an id for another request after Redis has lost its data. A fork that the earlier request
    published stays where it is.
    """
    journal = staging.own_journal()
    if journal is None:
        return None
    with suppress(ForkError):
        if not journal.is_campaign and ForkSpec.from_data(journal.spec).is_same_request(spec):
            return journal
    log.warning("the staging of %r belongs to another request with the same id; starting again", spec.destination)
    staging.discard_all_of(journal)
    return None


def _begin(attempt: Attempt, limits: Limits, start_early: StartEarly | None) -> CompleteFork | Plan:
    """Begin a new attempt, in which nothing of an earlier one is used."""
    spec, staging = attempt.spec, attempt.staging
    if attempt.journal is not None and attempt.journal.tries >= MAX_TRIES:
        raise worker_lost(spec.source)
    attempt.ends.refuse_existing()
    journal = attempt.journal = staging.begin(spec.to_data(), attempt.journal)
    require_noreplace(staging.fd, spec.destination)
    with open_work(attempt.ends, staging, spec.options, staging.make_tree(journal), KeptManifests()) as work:
        if "ownership" not in spec.options.preserve:
            staging.inherit_group(work.tree_fd)
        snapshot = _snapshot(attempt, journal, work)
        if snapshot is not None:
            return snapshot
        room = Room(work.tree_fd, spec.destination, job_of(staging.fd), is_queued=spec.owner == "queue")
        cloner = Cloner(spec.options, {}, room.counted(attempt.ticker.step))
        cloner.use_budget(budget_of(spec.options.max_copied_bytes))
        plan = _plan(attempt, journal, work, limits, cloner, room, start_early)
        if not plan.inline:
            return plan
        _clone_inline(attempt, work, plan, cloner)
        attempt.alone = journal.tries == 1 and room.reservation is None and not work.has_manifests()
        return _close_tree(attempt, work, plan, cloner)


def _snapshot(attempt: Attempt, journal: Journal, work: Workspace) -> CompleteFork | None:
    """Make the fork a snapshot of the source. Returns None if no snapshot can be made."""
    began = time.time()
    snapshot = snapshot_tree(work, attempt.staging, attempt.staging.tree_name(journal), attempt.ticker)
    if snapshot is None:
        return None
    attempt.reports["plan"] = snapshot.report
    attempt.clock.planned, attempt.clock.cloned = began, time.time()
    with open_work(attempt.ends, attempt.staging, attempt.spec.options, snapshot.fd) as work:
        return complete(attempt, work, subvolume=True)


def _plan(
    attempt: Attempt,
    journal: Journal,
    work: Workspace,
    limits: Limits,
    cloner: Cloner,
    room: Room,
    start_early: StartEarly | None,
) -> Plan:
    """Plan the fork. If it is divided into chunks, write its plan into the journal, from which any process goes on."""
    report = attempt.reports["plan"] = Report()
    early = start_early(work) if start_early is not None else None
    try:
        plan = make_plan(work, limits, cloner, attempt.ticker, report, room, early)
        report.totals.fallback = cloner.fallback
        report.totals.move_losses_from(cloner.metadata.losses)
        attempt.chunks = len(plan.chunks)
        attempt.clock.planned = time.time()
        if not plan.inline:
            _read_early_reports(attempt, early)
            _write_plan(attempt, journal, work, plan)
        return plan
    except BaseException:
        if early is not None:
            early.stop()  # before the tree is removed
        report.totals.fallback = cloner.fallback
        raise
    finally:
        if room.reservation is not None:
            attempt.staging.keep_open(room.reservation.fd)  # children and chunks rely on it


def _read_early_reports(attempt: Attempt, early: EarlyWorkers | None) -> None:
    """Read the reports of chunks that were done during the walk. Raises the ForkError of one that failed."""
    for number in early.finish_early() if early is not None else ():
        if attempt.staging.has_report(str(number)):
            attempt.reports[str(number)] = attempt.staging.report(str(number))
    attempt.raise_failure()


def _write_plan(attempt: Attempt, journal: Journal, work: Workspace, plan: Plan) -> None:
    """Keep the FileResults so far and write the plan; when this returns, any process may do its chunks."""
    attempt.ledger.keep_pages({part: report.close() for part, report in attempt.reports.items()}, replace_all=True)
    attempt.in_parts = True
    attempt.staging.write_report("plan", attempt.reports["plan"])
    planned = replace(
        journal,
        phase=Phase.CLONING,
        tree=trees.identity(work.tree_fd),
        plan=plan.to_data(),
        planned_at=attempt.clock.planned,
    )
    attempt.staging.write_journal(planned)


def _clone_inline(attempt: Attempt, work: Workspace, plan: Plan, cloner: Cloner) -> None:
    """Do all chunks of a small fork in this process. Raises the ForkError of one that failed."""
    for number, chunk in enumerate(plan.chunks):
        attempt.reports[str(number)] = run_chunk(work, plan, chunk, cloner, attempt.ticker)
    attempt.raise_failure()
    attempt.clock.cloned = time.time()


# -- finish


def _spec_in(staging: Staging, journal: Journal) -> ForkSpec:
    """The request in the journal. Raises ForkError if it is damaged, after all that it names is removed."""
    try:
        return ForkSpec.from_data(journal.spec)
    except ForkError:
        try_to_remove(partial(staging.discard_tree, journal))
        try_to_remove(staging.remove)
        raise


def _read_reports(attempt: Attempt, journal: Journal, abort: ForkError | None) -> Plan | None:
    """Read what the chunks did. Returns the plan if all are done, or None. Raises a chunk's ForkError, and `abort`."""
    plan = Plan.from_data(journal.plan) if journal.plan is not None else None
    if plan is not None:
        attempt.chunks, attempt.in_parts = len(plan.chunks), True
        attempt.reports = _reports(attempt.staging, plan)
        attempt.clock.cloned = time.time()
    attempt.raise_failure()
    if abort is not None:
        raise abort
    if plan is None:
        return None
    if len(attempt.reports) < len(plan.chunks) + 1:
        _require_tree(attempt, journal)
        return None
    return plan


def _require_tree(attempt: Attempt, journal: Journal) -> None:
    """Raise ForkError if the tree is gone: no chunk could be done, and none could report that."""
    try:
        os.close(attempt.staging.open_tree(journal))
    except FileNotFoundError as error:
        message = "the directory that it is made in was moved or removed by another process"
        raise ForkError(Code.IO_ERROR, message, attempt.ends.destination, error.errno) from None


def _reports(staging: Staging, plan: Plan) -> dict[str, Report]:
    """The reports in the staging, without their pages, which are in the ledger already."""
    if not staging.has_report("plan"):  # it was written before the plan, and no process would write it again
        raise Malformed("the report of its planning is missing")
    parts = ["plan", *map(str, range(len(plan.chunks)))]
    return {part: staging.report(part).without_pages() for part in parts if staging.has_report(part)}


def _close(attempt: Attempt, journal: Journal, plan: Plan) -> CompleteFork:
    """Close a fork whose chunks are done, after this try is counted in the journal."""
    if journal.closings >= MAX_TRIES:
        raise worker_lost(attempt.spec.source)
    journal = attempt.journal = replace(journal, closings=journal.closings + 1)
    staging = attempt.staging
    staging.write_journal(journal)
    _restore_lost_pages(attempt)
    with open_work(attempt.ends, staging, attempt.spec.options, staging.open_tree(journal)) as work:
        refused = {(src, dst): number for src, dst, number in plan.refused}
        return _close_tree(attempt, work, plan, Cloner(attempt.spec.options, refused, attempt.ticker.step))


def _restore_lost_pages(attempt: Attempt) -> None:
    """Keep the FileResults of parts again that the ledger has lost: a Redis that is killed forgets its last second."""
    lost = attempt.ledger.lost_parts(attempt.reports)
    if lost:
        log.warning(
            "the FileResults of %d parts of %r were lost and are kept again", len(lost), attempt.ends.destination
        )
    for part in lost:
        attempt.ledger.keep_pages({part: attempt.staging.report(part).pages})


# -- both


def _close_tree(attempt: Attempt, work: Workspace, plan: Plan, cloner: Cloner) -> CompleteFork:
    attempt.ticker.enter("publish", plan.entries, plan.bytes)
    again = attempt.journal is not None and attempt.journal.closings > 1
    attempt.reports["close"] = close_tree(work, plan, attempt.reports, cloner, attempt.ticker, replaces=again)
    return complete(attempt, work)
