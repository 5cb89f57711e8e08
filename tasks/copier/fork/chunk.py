"""One chunk: the files of a span of the manifest, or one byte range of a large file."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

from tasks.copier.clone.file import Cloner
from tasks.copier.errors import Code, ForkError
from tasks.copier.fork.plan import Chunk, Plan
from tasks.copier.fork.source_changes import refuse_changed_files
from tasks.copier.progress import Ticker
from tasks.copier.report import RangeDone, Report, failed
from tasks.copier.source.walk import Block, join
from tasks.copier.space.budget import chunk_budget
from tasks.copier.space.reservation import counted, job_of
from tasks.copier.staging.journal import Phase
from tasks.copier.staging.staging import Staging
from tasks.copier.staging.workspace import Workspace
from tasks.copier.validation import Malformed

#: How often a chunk is begun before its fork ends as worker_lost: its content may kill every worker.
MAX_TRIES = 4


def run_chunk(work: Workspace, plan: Plan, chunk: Chunk, cloner: Cloner, ticker: Ticker) -> Report:
    """Do one chunk. Its first failure ends the work and is reported in `totals.error`, not raised."""
    report = Report()
    try:
        if chunk.kind == "range":
            _copy_range(work, plan, chunk, cloner, ticker, report)
        else:
            _clone_files(work, plan, chunk, cloner, ticker, report)
    except ForkError as error:
        report.totals.error = report.totals.error or error.record()
    report.totals.fallback = cloner.fallback
    report.totals.move_losses_from(cloner.metadata.losses)
    return report


def run_held_chunk(
    work: Workspace,
    plan: Plan,
    chunk: Chunk,
    number: int,
    ticker: Ticker,
    keep: Callable[[Report], None] = lambda report: None,
) -> Report | None:
    """Do `chunk`, which is chunk `number`, unless it is done, and write its report into the staging.

    `keep` is called before the report is written, because a process that finds all reports publishes the fork, and no
    FileResults are kept after that. Returns None while another process does the chunk. If the chunk fails, all chunks
    of the fork are told to end. Raises OSError if the staging cannot be written, and what `keep` raises.
    """
    staging = work.staging
    with staging.hold_chunk(number) as begun, ExitStack() as opened:
        if begun is None:
            return None
        if staging.has_report(str(number)):
            return staging.report(str(number))
        if staging.is_stopped():
            return Report()
        if begun > MAX_TRIES:
            return fail_chunk(staging, number, worker_lost(work.ends.source))
        journal = staging.journal()
        step = opened.enter_context(counted(ticker.step, job_of(staging.fd), number))
        refused = {(src, dst): refusal for src, dst, refusal in plan.refused}
        cloner = Cloner(work.options, refused, step, replaces=begun > 1)
        cloner.use_budget(opened.enter_context(chunk_budget(staging, number, work.options.max_copied_bytes)))
        report = run_chunk(work, plan, chunk, cloner, ticker)
        report.replaced = begun > 1
        report.during_walk = journal is None or journal.phase is Phase.PLANNING
        error = report.totals.error
        if error is None or error["code"] != Code.CANCELLED:  # a chunk that was told to end is not the cause
            if not staging.is_current():  # taken over: another process keeps the results
                raise FileNotFoundError(errno.ENOENT, "the fork was taken over", staging.name)
            keep(report)
            staging.write_report(str(number), report)
        if error is not None:
            staging.stop()
        return report


def fail_chunk(staging: Staging, number: int, error: ForkError) -> Report:
    """Report that chunk `number` cannot be done, and signal the others to end. Raises OSError."""
    report = Report()
    report.totals.error = error.record()
    staging.write_report(str(number), report)  # before `stop`, in case this process dies in between
    staging.stop()
    return report


def worker_lost(path: str) -> ForkError:
    """The error for work that was begun MAX_TRIES times and never completed."""
    message = f"the processes that worked on it died {MAX_TRIES} times; the worker's log may say why"
    return ForkError(Code.WORKER_LOST, message, path)


def _clone_files(work: Workspace, plan: Plan, chunk: Chunk, cloner: Cloner, ticker: Ticker, report: Report) -> None:
    for block in _blocks(work, plan, chunk):
        done = plan.cloned_in(block.path)
        with work.place(block.path) as place:
            for entry in block.entries:
                if entry.name in done:  # perhaps during the walk: see `source_changes`
                    refuse_changed_files(work, Block(block.path, [entry]), place.src_fd)
                    continue
                try:
                    result = cloner.entry(place, entry)
                except ForkError as error:
                    if error.code is not Code.CANCELLED:
                        report.add(failed(join(block.path, entry.name), entry, error))
                    raise
                report.add(result)
                ticker(1, result["bytes"] - result["copied_bytes"])


def _copy_range(work: Workspace, plan: Plan, chunk: Chunk, cloner: Cloner, ticker: Ticker, report: Report) -> None:
    began = time.perf_counter()
    block = next(_blocks(work, plan, chunk))
    entry = block.entries[0]
    if chunk.end > entry.size:
        raise Malformed(f"a range ends at byte {chunk.end} of a file of {entry.size} bytes")
    done: RangeDone = {
        "path": join(block.path, entry.name),
        "size": entry.size,
        "copied_bytes": 0,
        "seconds": 0.0,
        "error": None,
    }
    report.ranges.append(done)
    try:
        with work.place(block.path) as place:
            done["copied_bytes"] = cloner.copy_range(place, entry, chunk.start, chunk.end)
    except ForkError as error:
        if error.code is not Code.CANCELLED:
            done["error"] = error.record()
        raise
    finally:
        done["seconds"] = time.perf_counter() - began
    ticker(0, chunk.end - chunk.start - done["copied_bytes"])


def _blocks(work: Workspace, plan: Plan, chunk: Chunk) -> Iterator[Block]:
    return work.blocks(plan.top.dev, span=chunk.span)
