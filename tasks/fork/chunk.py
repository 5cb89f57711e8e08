"""`forkvm.chunk`: one part of a fork that was too much for one task."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tasks.context import LOCK_WAIT, Context, ForkLedger, RetryLater
from tasks.copier.endpoints import reopen_endpoints
from tasks.copier.errors import Code, ForkError, from_oserror
from tasks.copier.fork.chunk import fail_chunk, run_held_chunk
from tasks.copier.fork.plan import Plan
from tasks.copier.fork_spec import ForkSpec
from tasks.copier.progress import Progress, Ticker
from tasks.copier.report import Report
from tasks.copier.staging.control_directory import Held
from tasks.copier.staging.journal import Journal, Phase
from tasks.copier.staging.staging import Staging
from tasks.copier.staging.workspace import open_work
from tasks.fork.finish import end_with, unknown_spec
from tasks.names import FINISH_TASK


def run_chunk(context: Context, fork_id: str, destination: str, number: int) -> None:
    """Do one chunk unless it is done or the fork is over; the one that ends the last chunk sends the finish.

    Raises Again while another process works on this very chunk, or plans or finishes the fork.
    """
    try:
        with _staging(context, fork_id, destination) as staging:
            journal = staging.own_journal() if staging is not None else None
            if staging is None:
                _look_after(context, fork_id, destination)
                return
            if journal is None or journal.phase is not Phase.CLONING or journal.plan is None:
                return
            plan = Plan.from_data(journal.plan)
            if number >= len(plan.chunks):  # of another plan, which was taken from a paused planner
                return
            with staging.with_heartbeat():
                report = _do(context, staging, journal, plan, number)
                if report is None:
                    raise RetryLater(staging.holder_heartbeat())
                over = staging.is_stopped() or all(staging.has_report(str(n)) for n in range(len(plan.chunks)))
    except Held as held:
        raise RetryLater(held.heartbeat) from None
    except FileNotFoundError:  # taken from this process while it was paused, or removed by someone
        _look_after(context, fork_id, destination)
        return
    except ForkError as error:  # what stands in the staging's place is not ours, or damaged
        end_with(context, unknown_spec(context, fork_id, destination), error)
        over = True
    except OSError as error:  # the staging cannot be written, so the failure cannot be reported there
        failure = from_oserror(error, "working in the staging directory", destination)
        end_with(context, unknown_spec(context, fork_id, destination), failure)
        over = True
    if over:
        context.send(FINISH_TASK, {"destination": destination}, fork_id)


def _look_after(context: Context, fork_id: str, destination: str) -> None:
    """See to it that a fork without staging has an end."""
    if context.results.final.fork(fork_id) is None:
        context.send(FINISH_TASK, {"destination": destination}, fork_id)


@contextmanager
def _staging(context: Context, fork_id: str, destination: str) -> Iterator[Staging | None]:
    try:
        parent = context.roots.open_parent(destination)
    except ForkError:  # the fork's finish will tell; there is nothing to write to
        yield None
        return
    with parent, Staging.attach(parent.fd, fork_id, LOCK_WAIT) as staging:
        yield staging


def _do(context: Context, staging: Staging, journal: Journal, plan: Plan, number: int) -> Report | None:
    spec = ForkSpec.from_data(journal.spec)

    def beat_and_look(progress: Progress) -> None:
        beat(progress)
        if staging.is_stopped():
            raise ForkError(Code.CANCELLED, "another chunk of the fork failed", "")

    def keep(report: Report) -> None:
        ForkLedger(context.results, spec.fork_id).keep_pages({str(number): report.close()})

    beat = context.beat(spec.fork_id, str(number), spec.destination)
    ticker = Ticker(beat_and_look)
    ticker.enter("copy", plan.entries, plan.bytes)
    try:
        ticker.poll_now()
        with (
            reopen_endpoints(context.roots, spec.source, spec.destination, plan.top.ino) as ends,
            open_work(ends, staging, spec.options, staging.open_tree(journal)) as work,
        ):
            report = run_held_chunk(work, plan, plan.chunks[number], number, ticker, keep)
            if ticker.progress["bytes_done"] or ticker.progress["files_done"]:  # not one that was done before
                context.publish_progress(spec.fork_id, str(number), ticker.progress)
            return report
    except ForkError as error:
        if error.code is Code.CANCELLED:
            staging.stop()
            return Report()
        return fail_chunk(staging, number, error)
