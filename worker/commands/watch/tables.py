"""An overview of a domain as tables. A name that a client chose is escaped."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TypeVar

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from tasks.copier.counted import counted
from tasks.names import BATCH_TASK, CHUNK_TASK, FINISH_TASK, inner_queue
from worker.commands.output import size
from worker.overview import Job, Overview, Worker
from worker.terminal.printing import printable

T = TypeVar("T")

#: Lines of a table that are not rows: the title, the names of the columns, the line below them, and one before the
#: next table.
_FRAME = 4
#: From this width of the terminal on, the destinations of jobs are shown too.
_WIDE = 120
#: The columns of names, which a client or a host chooses.
_NAMES = ("queue", "holds", "worker", "id", "destination")
#: Rows of each table that are shown in any case, and in all of an overview that is not cut.
_FEWEST, _MOST = 2, 20
#: A heartbeat of this age, in seconds, is marked: a worker has one every 2 s.
_OLD_HEARTBEAT = 10.0


def title(queue: str, reason: str) -> Text:
    """The first line of `forkvm top`; `reason` says why Redis cannot be read, if it cannot."""
    line = Text.assemble((f"Queue {queue}", "bold"), time.strftime("  %H:%M:%S"), no_wrap=True, overflow="ellipsis")
    return line.append(f"  {printable(reason)}", "bold red") if reason else line


def tables(overview: Overview, width: int, height: int | None = None) -> Group:
    """The three tables for a terminal of `width` columns, cut to `height` lines if it is given."""
    workers = jobs = _MOST
    if height is not None:
        left = height - (3 * _FRAME - 1) - len(overview.queues)
        workers = max(_FEWEST, min(len(overview.workers), left - min(len(overview.jobs), left // 2)))
        jobs = max(_FEWEST, left - workers)
    return Group(_queues(overview), "", _workers(overview, workers), "", _jobs(overview, jobs, is_wide=width >= _WIDE))


def _table(name: str, *columns: str, left: tuple[str, ...]) -> Table:
    """A table; the columns `left` hold text, the others numbers.

    In a narrow terminal those of `_NAMES` are cut, and no number is.
    """
    table = Table(title=name, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_edge=False)
    for column in columns:
        is_left = column in left
        table.add_column(
            column,
            justify="left" if is_left else "right",
            min_width=20 if column == columns[0] else len(column),
            no_wrap=column not in _NAMES,
        )
    return table


def _add_row(table: Table, *cells: str | Text) -> None:
    """Add a row of one line. Rich cuts only columns that may wrap, so their cells forbid it themselves."""
    line = [Text(cell) if isinstance(cell, str) else cell for cell in cells]
    for cell in line:
        cell.no_wrap, cell.overflow = True, "ellipsis"
    table.add_row(*line)


def _queues(overview: Overview) -> Table:
    holds = {
        overview.queue: "client requests",
        inner_queue(overview.queue, CHUNK_TASK): "chunks of forks",
        inner_queue(overview.queue, BATCH_TASK): "batches of campaigns",
        inner_queue(overview.queue, FINISH_TASK): "last steps",
    }
    table = _table("Queues", "queue", "holds", "waiting", "unacked", "oldest", left=("queue", "holds"))
    for queue in overview.queues:
        oldest = "" if queue.oldest_seconds is None else span(queue.oldest_seconds)
        _add_row(table, queue.name, holds.get(queue.name, ""), f"{queue.waiting:,}", f"{queue.unacked:,}", oldest)
    return table


def _workers(overview: Overview, most: int) -> Table:
    children = sum(worker.children for worker in overview.answering)
    busy = sum(worker.busy or 0 for worker in overview.answering)
    name = f"Workers: {len(overview.answering)}, {busy} of {children} children busy"
    if overview.silent:
        name += f"; {len(overview.silent)} without an answer"
    table = _table(name, "worker", "version", "busy", "idle", "heartbeat", left=("worker",))
    shown, rest = _cut([*overview.silent, *overview.answering], most)  # those that need a person first
    for worker in shown:
        _add_row(table, *_worker(worker))
    return _with_rest(table, rest)


def _worker(worker: Worker) -> tuple[Text, ...]:
    """The row of a worker."""
    is_lost = not worker.answers and not worker.ending
    style = "bold red" if is_lost else ""
    heartbeat = f"{span(worker.heartbeat_seconds)} ago"
    if not worker.answers:
        heartbeat = f"{'ending' if worker.ending else 'no answer'}, {heartbeat}"
    is_old = worker.heartbeat_seconds > _OLD_HEARTBEAT and not worker.ending
    return (
        Text(printable(worker.name), style),
        Text(printable(worker.version), style),
        *(Text("?" if number is None else str(number), style) for number in (worker.busy, worker.idle)),
        Text(heartbeat, "bold red" if is_lost or is_old else ""),
    )


def _jobs(overview: Overview, most: int, *, is_wide: bool) -> Table:
    name = f"In progress: {counted(overview.forks, 'fork')}, {counted(overview.campaigns, 'campaign')}"
    columns = ("id", "kind", "phase", "done", "of", *(("destination",) * is_wide))
    table = _table(name, *columns, left=("id", "kind", "phase", "destination"))
    shown, rest = _cut(overview.jobs, most)
    for job in shown:
        row = (Text(printable(job.id)), job.kind, *_progress(job), Text(printable(job.destination)))
        _add_row(table, *row[: len(columns)])
    return _with_rest(table, rest + overview.forks + overview.campaigns - len(overview.jobs))


def _progress(job: Job) -> tuple[str, str, str]:
    """The phase of a job, how much of it is done, and of how much."""
    progress = job.progress
    if progress is None:
        return job.state.lower(), "", ""
    if "forks_total" in progress:
        failed = f" ({progress['forks_failed']:,} failed)" if progress["forks_failed"] else ""
        return "copy", f"{progress['forks_done']:,}{failed}", f"{progress['forks_total']:,} forks"
    return str(progress["phase"]), size(progress["bytes_done"]), size(progress["bytes_total"])


def _cut(items: Sequence[T], most: int) -> tuple[Sequence[T], int]:
    """At most `most` rows' worth of items, with one row for the number of the others."""
    if len(items) <= most:
        return items, 0
    return items[: most - 1], len(items) - most + 1


def _with_rest(table: Table, rest: int) -> Table:
    if rest:
        _add_row(table, Text(f"and {rest:,} more", "dim"))
    return table


def span(seconds: float) -> str:
    """A time in its largest unit: 0.4 s, 12 s, 3 min, 2.5 h."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
