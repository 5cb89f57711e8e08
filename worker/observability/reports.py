"""What the processes of a worker report to its main process, through one pipe.

Each report is one line of JSON, written by one write(2) of at most PIPE_BUF bytes, which is atomic (pipe(7)): a process
that is killed leaves a whole report or none. The pipe keeps what a killed process wrote, and there are no files for
dead processes. A thread of the main process reads it.

A fork is reported before its result is stored. If its process is killed in between, its message is delivered again and
it is reported twice: `Repetitions` recognizes that.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import select
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import datetime
from threading import Thread
from typing import Any

from celery._state import get_current_task

from tasks.copier.campaign.spec import CampaignResult
from tasks.copier.fork_spec import ForkResult
from tasks.copier.kernel.filesystems import name_of_filesystem
from tasks.delivery.task_request import trace_headers
from tasks.events import Kind
from tasks.fork_summary import bytes_by_method, files_by_method
from tasks.names import FORK_TASK, job_fields

log = logging.getLogger(__name__)

#: A report: its kind, then its values; see `Reporter`.
Report = list[Any]

#: The size of the pipe, in bytes: the default limit for unprivileged processes (pipe(7)). It holds some 3000 reports.
_PIPE_BYTES = 1 << 20
#: How long a process waits if the pipe is full, in milliseconds. It is, only if the main process has stopped.
_FULL_MS = 1000
#: How often the main process reads, in seconds. Reading many reports at once costs less than a thread that wakes up
#: for each. Where a pipe has only the kernel's default size, it holds 190 reports.
_INTERVAL_SECONDS = 0.5
#: Longest id in a report, in bytes.
_LONGEST_ID = 256
#: Longest path in a report, in characters of JSON.
_LONGEST_PARENT = 1000

_NO_ERROR = {"code": ""}

_encode = json.JSONEncoder(separators=(",", ":")).encode


class Reporter:
    """The observer of a worker's processes: it writes reports into the pipe."""

    def __init__(self, fd: int, *, counts: bool = True, spans: bool = False) -> None:
        """`counts`: report what metrics count. `spans`: report what traces show. Refused reflinks are for the log."""
        self._fd = fd
        self._counts = counts
        self._spans = spans
        self._parent = ""
        self._is_full = False

    def forks_ended(self, run_id: str, results: Sequence[ForkResult], *, of_campaign: bool) -> None:
        """Report forks that have ended.

        `forks`, run id, finished_at, of_campaign, number of forks by status and error code, files by method, bytes by
        method, and the seconds of each phase of a single fork that succeeded.
        """
        self._report_fallback(results)
        if self._spans and not of_campaign:
            self._report_span("fork", run_id, results[0], datetime.fromisoformat(results[0]["started_at"]).timestamp())
        if not self._counts:
            return
        ends: dict[tuple[str, str], int] = {}
        for result in results:
            end = result["status"], (result["error"] or _NO_ERROR)["code"]
            ends[end] = ends.get(end, 0) + 1
        files, sizes = _summed(map(files_by_method, results)), _summed(map(bytes_by_method, results))
        first, run_id = results[0], _short(run_id)
        seconds = first["seconds"] if not of_campaign and first["error"] is None else {}
        by_end = [[*end, count] for end, count in ends.items()]
        self._write(["forks", run_id, first["finished_at"], of_campaign, by_end, files, sizes, seconds])
        self._report_parent(os.path.dirname(first["destination"]))

    def campaign_ended(self, result: CampaignResult) -> None:
        """Report a campaign that has ended: `campaign`, id, status."""
        if self._spans:
            started = time.time() - result["seconds"]["total"]
            self._report_span("campaign", result["campaign_id"], result, started)
        if self._counts:
            self._write(["campaign", _short(result["campaign_id"]), result["status"]])

    def happened(self, kind: Kind, reason: str) -> None:
        """Report anything else: its kind, and the reason if there is one."""
        if self._counts:
            self._write([kind, reason] if reason else [kind])

    def _report_span(self, job: str, job_id: str, result: ForkResult | CampaignResult, started: float) -> None:
        """Report what a trace shows of a job.

        `span`, kind of job, id, status, error code, the client's trace, when work began, seconds by phase.
        """
        parent = ""
        task: Any = get_current_task()
        if task is not None and job_id in job_fields(task.name, task.request.id).values():  # or it waited behind it
            parent = trace_headers(task).get("traceparent", "")
        code = (result["error"] or _NO_ERROR)["code"]
        self._write(["span", job, _short(job_id), result["status"], code, parent, started, result["seconds"]])

    def _report_fallback(self, results: Sequence[ForkResult]) -> None:
        """Report refused reflinks.

        `fallback`, errno, filesystems of the source and destination, number of forks; and for the log the first fork's
        id, and the name and id of its task. The forks of a campaign in one run have one source and one parent.
        """
        refused = [(result, result["fallback"]) for result in results if result["fallback"] is not None]
        if refused:
            result, fallback = refused[0]
            pair = [name_of_filesystem(path) for path in (result["source"], os.path.dirname(result["destination"]))]
            fork_id = result["fork_id"]
            self._write(["fallback", fallback["errno"], *pair, len(refused), _short(fork_id), *_task_of(fork_id)])

    def _report_parent(self, parent: str) -> None:
        """Report where forks are made, if it is not where this process made the last one: `parent`, path.

        A refused request may name anything as its destination, or nothing.
        """
        if parent != self._parent and parent.startswith("/") and len(_encode(parent)) <= _LONGEST_PARENT:
            self._parent = parent
            self._write(["parent", parent])

    def _write(self, report: Report) -> None:
        line = _encode(report).encode("ascii") + b"\n"
        try:
            try:
                os.write(self._fd, line)
            except BlockingIOError:
                room = select.poll()
                room.register(self._fd, select.POLLOUT)
                room.poll(0 if self._is_full else _FULL_MS)  # once, or each fork would take so long
                os.write(self._fd, line)
            self._is_full = False
        except OSError as error:
            if not self._is_full:
                log.warning("a report for the metrics was lost: the main process does not read: %s", error.strerror)
            self._is_full = True


def _task_of(fork_id: str) -> tuple[str, str]:
    """The name and the id of the task that this process does for a fork."""
    task: Any = get_current_task()
    if task is not None:
        ids = job_fields(task.name, task.request.id)
        if "campaign_id" in ids or ids.get("fork_id") == fork_id:
            return task.name, _short(task.request.id)
    return FORK_TASK, _short(fork_id)  # it waited behind another one, see `tasks.fork.waiting_forks`


def _summed(each: Iterable[dict[str, int]]) -> dict[str, int]:
    """The sums by key. Most often there is one fork, for which `Counter` would take a third of a report's time."""
    sums, *others = each
    for counts in others:
        for key, count in counts.items():
            sums[key] = sums.get(key, 0) + count
    return sums


def _short(job_id: str) -> str:
    """The id, or a digest of a long one: an id may take 6 KB as JSON."""
    encoded = job_id.encode("utf-8", "surrogatepass")
    return job_id if len(encoded) <= _LONGEST_ID else hashlib.sha256(encoded).hexdigest()


class Pipe:
    """The pipe, and the thread of the main process that reads it."""

    def __init__(self, *, counts: bool = True, spans: bool = False) -> None:
        """`counts`, `spans`: see `Reporter`."""
        self._read_fd, write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        with suppress(OSError):  # this user's other pipes take all that it may use
            fcntl.fcntl(write_fd, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        self.reporter = Reporter(write_fd, counts=counts, spans=spans)
        os.register_at_fork(after_in_child=self._forget_reader)
        self._rest = b""

    def start(self, takers: Sequence[Callable[[Report], None]]) -> None:
        """Start to read. Each of `takers` is called with each report."""
        Thread(target=self._run, args=(takers,), name="reports", daemon=True).start()

    def read(self) -> Iterator[Report]:
        """Yield the reports that were written since the last call."""
        while True:
            try:
                data = os.read(self._read_fd, _PIPE_BYTES)
            except BlockingIOError:
                return
            *lines, self._rest = (self._rest + data).split(b"\n")
            yield from json.loads(b"[" + b",".join(lines) + b"]")  # one call takes a third of the time of many

    def _run(self, takers: Sequence[Callable[[Report], None]]) -> None:
        written = select.poll()
        written.register(self._read_fd, select.POLLIN)
        while True:
            written.poll()
            for report in self.read():
                self._hand_out(report, takers)
            time.sleep(_INTERVAL_SECONDS)

    def _hand_out(self, report: Report, takers: Sequence[Callable[[Report], None]]) -> None:
        for take in takers:
            try:
                take(report)
            except Exception as error:  # without a reader, the pipe would fill, and each fork would wait
                log.warning("a report for the metrics was not counted: %s: %s", type(error).__name__, error)

    def _forget_reader(self) -> None:
        """In a forked child: only the main process reads. Once: its own children may use that number otherwise."""
        if self._read_fd >= 0:
            os.close(self._read_fd)
            self._read_fd = -1


class Repetitions:
    """Recognizes a job that is reported again because its process was killed before it stored the result."""

    #: An id is free again `FORKVM_RESULT_EXPIRES` after its job has ended, which is at least so many seconds.
    _SECONDS = 60.0
    #: Most jobs that are remembered.
    _MOST = 10_000

    def __init__(self) -> None:
        self._seen: OrderedDict[str, tuple[str, float]] = OrderedDict()

    def has_seen(self, run_id: str, finished_at: str) -> bool:
        """Whether this end of a job was reported before. If not, it is remembered.

        A fork that was published has the same `finished_at` in each report; one that failed is tried again at once.
        """
        now = time.monotonic()
        before = self._seen.get(run_id)
        self._seen[run_id] = finished_at, now
        self._seen.move_to_end(run_id)
        if len(self._seen) > self._MOST:
            self._seen.popitem(last=False)
        return before is not None and (before[0] == finished_at or now - before[1] < self._SECONDS)
