"""Child processes that share the chunks of one local fork among them."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import select
import signal
import struct
import sys
import time
import traceback
from contextlib import suppress

from tasks.copier.chunk import run_held_chunk
from tasks.copier.errors import Code, ForkError, from_errno, from_oserror
from tasks.copier.kernel import syscalls
from tasks.copier.kernel.processes import is_stopped
from tasks.copier.plan import Chunk, Plan
from tasks.copier.progress import Progress, Ticker
from tasks.copier.work import Work

#: A chunk in the pipe that all children read: its number, whether it is a range, offset, length, start, end.
_TOKEN = struct.Struct("=IIqqqq")
#: Room for the tokens of all chunks (FORKVM_MAX_CHUNKS is at most 10,000): a full pipe whose readers have died would
#: hold the parent for ever. What an ordinary user may have by default (pipe(7)).
_PIPE_BYTES = 1 << 20
#: Entries and bytes done, of one child, in memory that the parent reads.
_COUNTERS = struct.Struct("=qq")
#: How often the parent looks at its children's counters.
_LOOK_MILLISECONDS = 100
#: A child that is stopped for longer than this, in seconds, is not waited for.
_STOPPED_SECONDS = 10.0
#: Exit code of a child that met an error in this program; errnos are smaller.
_BUG = 255


class Children:
    """A crew of processes, spawned with the first chunk; each takes the next chunk as soon as it has done one.

    They inherit the parent's descriptors and its hold on the staging, which lasts until the last of them has ended.
    """

    def __init__(self, work: Work, count: int, ticker: Ticker) -> None:
        self._work = work
        self._count = max(1, count)
        self._ticker = ticker
        self._pids: list[int] = []
        #: `_COUNTERS` of each child; made with them.
        self._counters: mmap.mmap
        #: Children that are stopped, and when that was first seen, in seconds of the monotonic clock.
        self._stopped_since: dict[int, float] = {}
        self._tokens = self._pipe = -1
        self._taken: set[int] = set()

    def take(self, chunk: Chunk, number: int, plan: Plan) -> None:
        """Have a child do `chunk`."""
        if not self._pids:
            self._counters = mmap.mmap(-1, _COUNTERS.size * self._count)
            self._tokens, self._pipe = os.pipe()
            fcntl.fcntl(self._pipe, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
            self._pids = [self._spawn(n, plan) for n in range(self._count)]
        self._taken.add(number)
        is_range = chunk.kind == "range"
        os.write(self._pipe, _TOKEN.pack(number, is_range, chunk.offset, chunk.length, chunk.start, chunk.end))

    @property
    def is_at_work(self) -> bool:
        """Whether there are children."""
        return bool(self._pids)

    def complete(self, plan: Plan) -> None:
        """Have the chunks done that were not taken yet and have no report, and wait until all children have ended.

        Raises ForkError: what the ticker raised, or what kept a child from writing its report. No child lives then.
        """
        try:
            for number, chunk in enumerate(plan.chunks):
                if number not in self._taken and not self._work.staging.has_report(str(number)):
                    self.take(chunk, number, plan)
            self._wait()
        except OSError as error:
            self.dismiss()
            raise from_oserror(error, "sharing the work among processes", self._work.ends.destination) from None

    def walk_ended(self) -> list[int]:
        """They go on, and `complete` gives them the rest; see `Crew.walk_ended`."""
        return []

    def dismiss(self) -> None:
        """Stop all work; when this returns, no child lives."""
        if self._pids:
            self._stop()
            self._reap()

    def _wait(self) -> None:
        done_before = self._ticker.progress["files_done"], self._ticker.progress["bytes_done"]
        stopping: ForkError | None = None
        self._close_pipe()
        pidfds = [os.pidfd_open(pid) for pid in self._pids]
        poll = select.poll()
        for fd in pidfds:
            poll.register(fd, select.POLLIN)
        running = len(pidfds)
        while running:
            for fd, _ in poll.poll(_LOOK_MILLISECONDS):
                poll.unregister(fd)
                os.close(fd)
                running -= 1
            self._end_stopped()
            try:
                self._tell(done_before)
            except ForkError as error:
                stopping = stopping or error
                self._stop()
        codes = self._reap()
        if stopping is not None:
            raise stopping
        for code in codes:
            if code == _BUG:
                raise ForkError(Code.IO_ERROR, "a child met an error in this program", self._work.ends.source)
            if code > 0:
                raise from_errno(code, "working in the staging directory", self._work.ends.destination)

    def _close_pipe(self) -> None:
        """Let the children end: each does when it finds the pipe empty."""
        if self._pipe >= 0:
            syscalls.release(self._pipe)
            self._pipe = -1

    def _take_back(self) -> set[int]:
        """Take the chunks out of the pipe that no child has begun; no others can be given from then on."""
        self._close_pipe()
        tokens = iter(lambda: os.read(self._tokens, _TOKEN.size), b"")
        return {_TOKEN.unpack(token)[0] for token in tokens}

    def _stop(self) -> None:
        """Have the children end: within their chunk, or after it where the staging is too full to say so there."""
        self._take_back()
        with suppress(OSError):
            self._work.staging.stop()

    def _reap(self) -> list[int]:
        """Wait for all children; their exit codes, negative for a signal."""
        self._close_pipe()
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in self._pids]
        syscalls.release(self._tokens)
        self._pids, self._tokens = [], -1
        return codes

    def _end_stopped(self) -> None:
        """Kill a child that has been stopped for long: what it had in hand is done again, and nobody waits for it."""
        now = time.monotonic()
        for pid in self._pids:
            if not is_stopped(pid):
                self._stopped_since.pop(pid, None)
            elif now - self._stopped_since.setdefault(pid, now) > _STOPPED_SECONDS:
                os.kill(pid, signal.SIGKILL)  # ours, and not reaped yet: the pid is nobody else's

    def _tell(self, done_before: tuple[int, int]) -> None:
        files, count = done_before
        for n in range(self._count):
            child_files, child_count = _COUNTERS.unpack_from(self._counters, n * _COUNTERS.size)
            files, count = files + child_files, count + child_count
        self._ticker.progress["files_done"], self._ticker.progress["bytes_done"] = files, count
        self._ticker.look()

    def _spawn(self, index: int, plan: Plan) -> int:
        parent = os.getpid()
        pid = os.fork()
        if pid:
            return pid
        code = _BUG
        try:
            code = self._work_through(index, plan, parent)
        except OSError as error:
            code = error.errno or errno.EIO
        except BaseException:
            traceback.print_exc(file=sys.stderr)
        finally:
            os._exit(code)

    def _work_through(self, index: int, plan: Plan, parent: int) -> int:
        # The parent answers for the terminal and for TERM; a child left without it would hold the lock for ever.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        syscalls.die_with_parent(signal.SIGKILL)
        if os.getppid() != parent:
            return 0
        os.close(self._pipe)  # the parent's end: while a child held it open, none would see the end of the work

        def tell(progress: Progress) -> None:
            at = index * _COUNTERS.size
            _COUNTERS.pack_into(self._counters, at, progress["files_done"], progress["bytes_done"])

        def beat(progress: Progress) -> None:
            tell(progress)
            if self._work.staging.is_stopped():
                raise ForkError(Code.CANCELLED, "another part of the fork failed or was cancelled", "")

        ticker = Ticker(beat)
        while token := os.read(self._tokens, _TOKEN.size):
            number, is_range, offset, length, start, end = _TOKEN.unpack(token)
            chunk = Chunk("range" if is_range else "files", offset, length, start, end)
            report = run_held_chunk(self._work, plan, chunk, number, ticker)
            if report is None or report.totals.error is not None:
                break
            tell(ticker.progress)
        return 0
