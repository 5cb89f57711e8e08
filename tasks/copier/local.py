"""A fork in this process and its children, without a broker: the same steps, the same result."""

from __future__ import annotations

import errno
import mmap
import os
import select
import signal
import struct
import sys
import traceback

from tasks.copier import syscalls
from tasks.copier.chunk import run_held_chunk
from tasks.copier.ends import Ends, open_ends
from tasks.copier.errors import Code, ForkError, from_errno, from_oserror
from tasks.copier.fork import finish, start
from tasks.copier.options import Limits
from tasks.copier.plan import Plan
from tasks.copier.progress import Beat, Progress, Ticker
from tasks.copier.report import Totals
from tasks.copier.roots import Roots
from tasks.copier.spec import Clock, ForkResult, ForkSpec, failed
from tasks.copier.staging import Staging
from tasks.copier.work import Work, open_work

#: A chunk's number in the pipe that the children share.
_TOKEN = struct.Struct("=I")
#: Entries and bytes done, of one child, in memory that the parent reads.
_COUNTERS = struct.Struct("=qq")
#: How often the parent looks at its children's counters.
_LOOK_MILLISECONDS = 100
#: Exit code of a child that met an error in this program; errnos are smaller.
_BUG = 255


class _NoLedger:
    """A local fork's results go to its caller alone."""

    def keep_pages(self, part: str, pages: list[bytes]) -> None:
        """Nobody asks for them later."""

    def settle(self, result: ForkResult) -> None:
        """The caller gets it."""


def fork_here(spec: ForkSpec, roots: Roots, limits: Limits, processes: int, beat: Beat) -> ForkResult:
    """Make one fork with at most `processes` children. Never raises ForkError: a failure is a result.

    `beat` is called about four times a second and raises ForkError to end the fork.
    """
    try:
        with open_ends(roots, spec.source, spec.destination) as ends:
            return _fork(ends, spec, limits, processes, beat)
    except ForkError as error:
        return failed(spec, error, Totals(), 0, Clock(spec.started))


def _fork(ends: Ends, spec: ForkSpec, limits: Limits, processes: int, beat: Beat) -> ForkResult:
    ticker, ledger = Ticker(beat), _NoLedger()
    try:
        with Staging.claim(ends.parent_fd, spec.fork_id, wait=0) as staging:
            plan = start(ends, staging, spec, limits, ticker, ledger)
            if not isinstance(plan, Plan):
                return plan
            abort = _run_chunks(ends, staging, spec, plan, processes, ticker)
            result = finish(ends, staging, ticker, ledger, abort)
            if result is None:
                raise ForkError(Code.IO_ERROR, "chunks were left undone", spec.source)
            return result
    except OSError as error:
        raise from_oserror(error, "making the staging directory", spec.destination) from None


def _run_chunks(
    ends: Ends, staging: Staging, spec: ForkSpec, plan: Plan, processes: int, ticker: Ticker
) -> ForkError | None:
    """Have children do all chunks; what a dead child left undone is begun again. Returns why to give up, if so."""
    journal = staging.journal()
    if journal is None:
        return ForkError(Code.IO_ERROR, "the staging directory was removed", spec.destination)
    with open_work(ends, staging, journal, spec.options, staging.open_tree(journal)) as work:
        while missing := [n for n in range(len(plan.chunks)) if not staging.has_report(str(n))]:
            try:
                _Children(work, plan, missing, min(processes, len(missing)), ticker.progress).wait(ticker)
            except ForkError as error:
                return error
            if staging.is_stopped():
                return None
    return None


class _Children:
    """Child processes that share the chunks of one fork among them."""

    def __init__(self, work: Work, plan: Plan, chunks: list[int], count: int, progress: Progress) -> None:
        self._work, self._plan = work, plan
        self._done_before = progress["files_done"], progress["bytes_done"]
        self._counters = mmap.mmap(-1, _COUNTERS.size * count)
        self._tokens, writer = os.pipe()
        os.write(writer, b"".join(_TOKEN.pack(number) for number in chunks))  # at most Limits.max_chunks: fits a pipe
        os.close(writer)
        self._pids = [self._spawn(n) for n in range(count)]

    def wait(self, ticker: Ticker) -> None:
        """Wait until all children have ended, telling the ticker what they did.

        Raises ForkError: what the ticker raised, or what kept a child from writing its report.
        """
        stopping: ForkError | None = None
        pidfds = [os.pidfd_open(pid) for pid in self._pids]
        try:
            poll = select.poll()
            for fd in pidfds:
                poll.register(fd, select.POLLIN)
            running = len(pidfds)
            while running:
                for fd, _ in poll.poll(_LOOK_MILLISECONDS):
                    poll.unregister(fd)
                    running -= 1
                try:
                    self._tell(ticker)
                except ForkError as error:
                    stopping = stopping or error
                    self._work.staging.stop()
        finally:
            for fd in pidfds:
                os.close(fd)
            codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in self._pids]
            os.close(self._tokens)
            self._counters.close()
        if stopping is not None:
            raise stopping
        for code in codes:
            if code == _BUG:
                raise ForkError(Code.IO_ERROR, "a child met an error in this program", self._work.ends.source)
            if code > 0:
                raise from_errno(code, "working in the staging directory", self._work.ends.destination)

    def _tell(self, ticker: Ticker) -> None:
        files, count = self._done_before
        for n in range(len(self._pids)):
            child_files, child_count = _COUNTERS.unpack_from(self._counters, n * _COUNTERS.size)
            files, count = files + child_files, count + child_count
        ticker.progress["files_done"], ticker.progress["bytes_done"] = files, count
        ticker.look()

    def _spawn(self, index: int) -> int:
        parent = os.getpid()
        pid = os.fork()
        if pid:
            return pid
        code = _BUG
        try:
            code = self._work_through(index, parent)
        except OSError as error:
            code = error.errno or errno.EIO
        except BaseException:
            traceback.print_exc(file=sys.stderr)
        finally:
            os._exit(code)

    def _work_through(self, index: int, parent: int) -> int:
        # The parent answers for the terminal and for TERM; a child left without it would hold the lock for ever.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        syscalls.die_with_parent(signal.SIGKILL)
        if os.getppid() != parent:
            return 0

        def beat(progress: Progress) -> None:
            at = index * _COUNTERS.size
            _COUNTERS.pack_into(self._counters, at, progress["files_done"], progress["bytes_done"])
            if self._work.staging.is_stopped():
                raise ForkError(Code.CANCELLED, "another part of the fork failed or was cancelled", "")

        ticker = Ticker(beat)
        while token := os.read(self._tokens, _TOKEN.size):
            report = run_held_chunk(self._work, self._plan, _TOKEN.unpack(token)[0], ticker)
            beat(ticker.progress)
            if report is None or report.totals.error is not None:
                break
        return 0
