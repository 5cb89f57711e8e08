"""Child processes that share the chunks of one local fork among them."""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from collections.abc import Iterator
from contextlib import suppress
from functools import partial

from tasks.copier.child_processes import PROGRAM_ERROR, ChildProcesses
from tasks.copier.errors import Code, ForkError, from_errno, from_oserror, from_record
from tasks.copier.fork.chunk import run_held_chunk
from tasks.copier.fork.plan import Chunk, Plan
from tasks.copier.kernel import syscalls
from tasks.copier.progress import Progress, Ticker
from tasks.copier.staging.workspace import Workspace

#: A chunk in the pipe that all children read: its number, whether it is a range, offset, length, start, end.
_TOKEN = struct.Struct("=IIqqqq")
#: Room for the tokens of all chunks (FORKVM_MAX_CHUNKS is at most 10,000): a full pipe whose readers have died would
#: block the parent forever. What an ordinary user may have by default (pipe(7)).
_PIPE_BYTES = 1 << 20
#: Entries and bytes done, of one child, in memory that the parent reads.
_COUNTERS = struct.Struct("=qq")


class ChildPool:
    """Processes that are started with the first chunk; each takes the next chunk as soon as it has done one.

    Where the system has no process to spare, the parent does the chunks itself.
    """

    def __init__(self, work: Workspace, count: int, ticker: Ticker) -> None:
        self._work = work
        self._count = max(1, count)
        self._ticker = ticker
        self._processes = ChildProcesses()
        #: `_COUNTERS` of each child; made with them.
        self._counters: mmap.mmap
        self._tokens = self._pipe = -1
        self._taken: set[int] = set()

    def take(self, chunk: Chunk, number: int, plan: Plan) -> None:
        """Have a child do `chunk`."""
        if not self.is_at_work:
            self._start(plan)
        self._taken.add(number)
        is_range = chunk.kind == "range"
        os.write(self._pipe, _TOKEN.pack(number, is_range, chunk.offset, chunk.length, chunk.start, chunk.end))

    @property
    def is_at_work(self) -> bool:
        """Whether chunks were taken that are not known to be done."""
        return self._tokens >= 0

    def complete(self, plan: Plan) -> None:
        """Have the chunks done that were not taken yet and have no report, and wait until all children have ended.

        Raises ForkError: what the ticker raised, or what kept a child from writing its report. No child lives then.
        """
        try:
            for number, chunk in enumerate(plan.chunks):
                if number not in self._taken and not self._work.staging.has_report(str(number)):
                    self.take(chunk, number, plan)
            self._wait(plan)
        except OSError as error:
            self.dismiss()
            raise from_oserror(error, "sharing the work among processes", self._work.ends.destination) from None

    def walk_ended(self) -> list[int]:
        """They go on, and `complete` gives them the rest; see `Crew.walk_ended`."""
        return []

    def dismiss(self) -> None:
        """Stop all work; when this returns, no child lives."""
        if self.is_at_work:
            self._stop()
            self._processes.reap()
            self._close()

    def _start(self, plan: Plan) -> None:
        self._counters = mmap.mmap(-1, _COUNTERS.size * self._count)
        self._tokens, self._pipe = os.pipe()
        fcntl.fcntl(self._pipe, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        for index in range(self._count):
            if not self._processes.spawn(partial(self._work_through, index, plan)):
                break

    def _wait(self, plan: Plan | None = None) -> None:
        """Wait until all that was taken is done. `plan` is for chunks that no child is there to do."""
        if not self.is_at_work:
            return
        self._close_pipe()
        if not self._processes and plan is not None:
            self._work_here(plan)
        done_before = self._ticker.progress["files_done"], self._ticker.progress["bytes_done"]
        try:
            codes = self._processes.wait(partial(self._publish_progress, done_before))
        except ForkError:
            self.dismiss()
            raise
        self._close()
        if PROGRAM_ERROR in codes:
            raise self._processes.program_error(self._work.ends.source)
        for code in codes:
            if code > 0:
                raise from_errno(code, "working in the staging directory", self._work.ends.destination)

    def _close_pipe(self) -> None:
        """Let the children end: each does when it finds the pipe empty."""
        if self._pipe >= 0:
            syscalls.release(self._pipe)
            self._pipe = -1

    def _close(self) -> None:
        self._close_pipe()
        syscalls.release(self._tokens)
        self._tokens = -1

    def _take_back(self) -> set[int]:
        """Take the chunks out of the pipe that no child has begun; no others can be given from then on."""
        self._close_pipe()
        return {number for number, _ in self._next_chunks()}

    def _next_chunks(self) -> Iterator[tuple[int, Chunk]]:
        """Yield chunks from the pipe, with their numbers, until it is empty and no more can come."""
        while token := os.read(self._tokens, _TOKEN.size):
            number, is_range, offset, length, start, end = _TOKEN.unpack(token)
            yield number, Chunk("range" if is_range else "files", offset, length, start, end)

    def _stop(self) -> None:
        """Have the children end: within their chunk, or after it where the staging is too full to say so there."""
        self._take_back()
        with suppress(OSError):
            self._work.staging.stop()

    def _publish_progress(self, done_before: tuple[int, int]) -> None:
        files, count = done_before
        for n in range(self._count):
            child_files, child_count = _COUNTERS.unpack_from(self._counters, n * _COUNTERS.size)
            files, count = files + child_files, count + child_count
        self._ticker.progress["files_done"], self._ticker.progress["bytes_done"] = files, count
        self._ticker.poll()

    def _work_here(self, plan: Plan) -> None:
        """Do the chunks in this process. Raises ForkError: what the ticker raised."""
        for number, chunk in self._next_chunks():
            report = run_held_chunk(self._work, plan, chunk, number, self._ticker)
            error = report.totals.error if report is not None else None
            if error is not None and error["code"] == Code.CANCELLED:
                raise from_record(error)
            if error is not None:
                return

    def _work_through(self, index: int, plan: Plan) -> int:
        """Do chunks in a child until there are none; its exit code."""
        os.close(self._pipe)  # the parent's end: while a child held it open, none would see the end of the work

        def publish(progress: Progress) -> None:
            at = index * _COUNTERS.size
            _COUNTERS.pack_into(self._counters, at, progress["files_done"], progress["bytes_done"])

        def beat(progress: Progress) -> None:
            publish(progress)
            if self._work.staging.is_stopped():
                raise ForkError(Code.CANCELLED, "another part of the fork failed or was cancelled", "")

        ticker = Ticker(beat)
        for number, chunk in self._next_chunks():
            report = run_held_chunk(self._work, plan, chunk, number, ticker)
            if report is None or report.totals.error is not None:
                break
            publish(ticker.progress)
        return 0
