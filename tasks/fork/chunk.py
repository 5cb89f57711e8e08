"""`forkvm.chunk`: one part of a fork that is too large for one task."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from tasks.context import Context
from tasks.copier.endpoints import reopen_endpoints
from tasks.copier.errors import Code, ForkError, from_oserror
from tasks.copier.fork.chunk import fail_chunk, run_held_chunk
from tasks.copier.fork.plan import Plan
from tasks.copier.fork_spec import ForkSpec
from tasks.copier.progress import Progress, Ticker
from tasks.copier.report import Report
from tasks.copier.staging.control_directory import LOCK_WAIT
from tasks.copier.staging.journal import Journal, Phase
from tasks.copier.staging.staging import Staging
from tasks.copier.staging.workspace import open_work
from tasks.delivery.outcome import RetryLater, outcome_of
from tasks.fork.ending import end_fork, spec_from_claim
from tasks.names import CHUNK_TASK, FINISH_TASK


def send_chunks(context: Context, spec: ForkSpec, numbers: list[int]) -> None:
    """Send the chunks with these numbers."""
    for number in numbers:
        arguments = {"fork_id": spec.fork_id, "destination": spec.destination, "number": number}
        context.send(CHUNK_TASK, arguments, f"{spec.fork_id}.chunk.{number}")


def run_chunk(context: Context, fork_id: str, destination: str, number: int) -> None:
    """Do one chunk unless it is done or the fork has ended. The task that does the last chunk sends the finish.

    Raises RetryLater while another process works on this chunk, or plans or finishes the fork.
    """

    def fail(error: ForkError | OSError) -> bool:
        if isinstance(error, FileNotFoundError):  # taken from this process while it was paused, or removed by someone
            return _has_no_result(context, fork_id)
        if isinstance(error, OSError):  # the staging cannot be written, so the chunk cannot report its failure there
            error = from_oserror(error, "working in the staging directory", destination)
        end_fork(context, spec_from_claim(context, fork_id, destination), error)
        return True

    if outcome_of(lambda: _run(context, fork_id, destination, number), fail):
        context.send(FINISH_TASK, {"destination": destination}, fork_id)


def _run(context: Context, fork_id: str, destination: str, number: int) -> bool:
    """Do the chunk; whether the finish is to be sent."""
    with _staging(context, fork_id, destination) as staging:
        if staging is None:
            return _has_no_result(context, fork_id)
        journal = staging.own_journal()
        if journal is None or journal.phase is not Phase.CLONING or journal.plan is None:
            return False
        plan = Plan.from_data(journal.plan)
        if number >= len(plan.chunks):  # a chunk of another plan, whose planner was paused and lost the fork
            return False
        with staging.with_heartbeat():
            report = _clone(context, staging, journal, plan, number)
            if report is None:
                raise RetryLater(staging.holder_heartbeat())
            return staging.is_stopped() or all(staging.has_report(str(n)) for n in range(len(plan.chunks)))


def _has_no_result(context: Context, fork_id: str) -> bool:
    """Whether the finish is to be sent for a fork without staging, so that the fork ends."""
    return context.results.final.fork(fork_id) is None


@contextmanager
def _staging(context: Context, fork_id: str, destination: str) -> Iterator[Staging | None]:
    """Hold the fork's staging, shared; None if there is none."""
    with ExitStack() as opened:
        try:
            parent = opened.enter_context(context.roots.open_parent(destination))
        except ForkError:  # there is no staging to write a failure to; the finish reports this one
            yield None
            return
        yield opened.enter_context(Staging.attach(parent.fd, fork_id, LOCK_WAIT))


def _clone(context: Context, staging: Staging, journal: Journal, plan: Plan, number: int) -> Report | None:
    """Clone what the chunk covers: its report, or None while another process works on this chunk."""
    spec = ForkSpec.from_data(journal.spec)
    poll = context.poll_of(spec.fork_id, str(number), spec.destination)

    def poll_unless_stopped(progress: Progress) -> None:
        poll(progress)
        if staging.is_stopped():
            raise ForkError(Code.CANCELLED, "another chunk of the fork failed", "")

    def keep(report: Report) -> None:
        context.plain_ledger(spec.fork_id).keep_pages({str(number): report.close()})

    ticker = Ticker(poll_unless_stopped, context.pace)
    ticker.enter("copy", plan.entries, plan.bytes)
    try:
        ticker.poll_now()
        with (
            reopen_endpoints(context.roots, spec.source, spec.destination, plan.top.ino) as ends,
            open_work(ends, staging, spec.options, staging.open_tree(journal)) as work,
        ):
            report = run_held_chunk(work, plan, plan.chunks[number], number, ticker, keep)
            if ticker.progress["bytes_done"] or ticker.progress["files_done"]:  # zero if the chunk was done before
                context.publish_progress(spec.fork_id, str(number), ticker.progress)
            return report
    except ForkError as error:
        if error.code is Code.CANCELLED:
            staging.stop()
            return Report()
        return fail_chunk(staging, number, error)
