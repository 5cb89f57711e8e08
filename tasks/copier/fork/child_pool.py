"""Child processes that share the chunks of one fork on this host.

The parent writes one token for each chunk into a pipe, and every child reads the next token when it is free.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import suppress
from functools import partial

from tasks.copier.child_processes import ChildProcesses, SharedCounters
from tasks.copier.errors import Code, ForkError, from_oserror, from_record
from tasks.copier.fork.chunk import run_held_chunk
from tasks.copier.fork.plan import Chunk, Plan
from tasks.copier.kernel import syscalls
from tasks.copier.progress import Progress, Ticker
from tasks.copier.staging.workspace import Workspace

#: A chunk in the pipe that all children read: its number, whether it is a range, offset, length, start, end.
_TOKEN = struct.Struct("=IIqqqq")
#: Size of the pipe: it has room for the tokens of all chunks (FORKVM_MAX_CHUNKS is at most 10,000). If the pipe were
#: full and its readers dead, the parent would block. It is what an unprivileged user may have by default (pipe(7)).
_PIPE_BYTES = 1 << 20


class ChildPool:
    """Children that start with the first chunk; each takes the next chunk when it has done one.

    If the system has no process left, the parent does the chunks itself.
    """

    def __init__(self, work: Workspace, count: int, ticker: Ticker) -> None:
        self._work = work
        self._count = max(1, count)
        self._ticker = ticker
        self._processes = ChildProcesses()
        #: Entries and bytes done by each child; created when they start.
        self._counters: SharedCounters
        self._tokens = self._pipe = -1
        self._taken: set[int] = set()

    def take(self, chunk: Chunk, number: int, plan: Plan) -> None:
        """Give `chunk` to the children. Raises OSError."""
        if not self.is_at_work:
            self._start(plan)
        self._taken.add(number)
        is_range = chunk.kind == "range"
        os.write(self._pipe, _TOKEN.pack(number, is_range, chunk.offset, chunk.length, chunk.start, chunk.end))

    @property
    def is_at_work(self) -> bool:
        """Whether the children were started and not waited for."""
        return self._tokens >= 0

    def complete(self, work: Workspace, plan: Plan) -> None:
        """Have the chunks done that were not taken and have no report, and wait until all children have ended.

        `work` is open in this process; the one that the pool was created with may be closed.

        Raises ForkError: what the ticker raised, or why a child could not write its report. No child runs then.
        """
        self._work = work
        try:
            for number, chunk in enumerate(plan.chunks):
                if number not in self._taken and not self._work.staging.has_report(str(number)):
                    self.take(chunk, number, plan)
            self._wait(plan)
        except OSError as error:
            self.stop()
            raise from_oserror(error, "sharing the work among processes", self._work.ends.destination) from None

    def finish_early(self) -> list[int]:
        """Nothing is finished yet: the children go on, and `complete` gives them the rest."""
        return []

    def stop(self) -> None:
        """Stop all work. When this returns, no child runs."""
        if self.is_at_work:
            self._take_back()
            with suppress(OSError):  # the disk is full: the children end after their chunk, not within it
                self._work.staging.stop()
            self._processes.reap()
            self._close()

    def _start(self, plan: Plan) -> None:
        self._counters = SharedCounters(self._count)
        self._tokens, self._pipe = os.pipe()
        fcntl.fcntl(self._pipe, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        self._processes.start(self._count, partial(self._run_child, plan))

    def _wait(self, plan: Plan | None = None) -> None:
        """Wait until all that was taken is done. With `plan`, this process does it if it has no children."""
        if not self.is_at_work:
            return
        self._close_pipe()
        if not self._processes and plan is not None:
            self._work_here(plan)
        done_before = self._ticker.progress["files_done"], self._ticker.progress["bytes_done"]
        try:
            codes = self._processes.wait(partial(self._publish_progress, done_before))
        except ForkError:
            self.stop()
            raise
        self._close()
        error = self._processes.error_in(codes, self._work.ends.source, self._work.ends.destination)
        if error is not None:
            raise error

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
        """Take the chunks out of the pipe that no child has started. No chunk can be given after that."""
        self._close_pipe()
        return {number for number, _ in self._next_chunks()}

    def _next_chunks(self) -> Iterator[tuple[int, Chunk]]:
        """Yield numbers and chunks from the pipe until it is empty and its writing end is closed."""
        while token := os.read(self._tokens, _TOKEN.size):
            number, is_range, offset, length, start, end = _TOKEN.unpack(token)
            yield number, Chunk("range" if is_range else "files", offset, length, start, end)

    def _publish_progress(self, done_before: tuple[int, int]) -> None:
        files, count = self._counters.sums()
        self._ticker.progress["files_done"] = done_before[0] + files
        self._ticker.progress["bytes_done"] = done_before[1] + count
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

    def _run_child(self, plan: Plan, child: int) -> int:
        """Do chunks in a child until there are none. Returns its exit code."""
        os.close(self._pipe)  # the parent's end: while a child holds it open, no child sees the end of the work

        def publish(progress: Progress) -> None:
            self._counters.set(child, progress["files_done"], progress["bytes_done"])

        def poll(progress: Progress) -> None:
            publish(progress)
            if self._work.staging.is_stopped():
                raise ForkError(Code.CANCELLED, "another part of the fork failed or was cancelled", "")

        ticker = Ticker(poll, self._ticker.pace)
        for number, chunk in self._next_chunks():
            report = run_held_chunk(self._work, plan, chunk, number, ticker)
            if report is None or report.totals.error is not None:
                break
            publish(ticker.progress)
        return 0
