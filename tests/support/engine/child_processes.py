"""Child processes of a test: with another user, another umask, or killed."""

from __future__ import annotations

import ctypes
import os
import pickle
import select
import signal
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Generic, TypeVar

T = TypeVar("T")

#: An ordinary user, the user nobody of every system.
NOBODY = 65534
_PR_SET_DUMPABLE = 4


class ChildEnded(AssertionError):
    """A child ended without a result, by a signal or with an exit status."""


class Child(Generic[T]):
    """A child process that runs `work` and returns its result."""

    def __init__(
        self,
        work: Callable[[], T],
        *,
        user: int | None = None,
        groups: Iterable[int] = (),
        umask: int | None = None,
    ) -> None:
        self._reader, writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            _run(work, writer, user, groups, umask)
        os.close(writer)

    def kill(self) -> None:
        """Send SIGKILL; return when the child has ended."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self._reader)

    def is_done(self, within: float) -> bool:
        """Whether the child has its result, or ends within so many seconds."""
        return bool(select.select([self._reader], [], [], within)[0])

    def result(self) -> T:
        """Wait for the end.

        ChildDied if there is no result, AssertionError with the child's traceback if it raised an exception.
        """
        with open(self._reader, "rb") as reader:
            data = reader.read()
        _, status = os.waitpid(self.pid, 0)
        if not data:
            raise ChildEnded(f"the child ended with {os.waitstatus_to_exitcode(status)}")
        answer: tuple[T, str | None] = pickle.loads(data)
        assert answer[1] is None, answer[1]
        return answer[0]


def children_of_this_process() -> list[int]:
    """The pids of the children of this process's main thread that are running or not reaped, the oldest first.

    An earlier test may have left some: a test that looks for its own child ignores those that existed before.
    """
    return list(map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()))


def in_child(
    work: Callable[[], T], *, user: int | None = None, groups: Iterable[int] = (), umask: int | None = None
) -> T:
    """The result of `work` in a child process; see `Child`."""
    return Child(work, user=user, groups=groups, umask=umask).result()


def _run(work: Callable[[], Any], writer: int, user: int | None, groups: Iterable[int], umask: int | None) -> None:
    answer: tuple[Any, str | None]
    try:
        if umask is not None:
            os.umask(umask)
        if user is not None:
            _become(user, groups)
        answer = work(), None
    except BaseException:
        answer = None, traceback.format_exc()
    try:
        with open(writer, "wb") as pipe:
            pickle.dump(answer, pipe)
    finally:
        os._exit(0)


def _become(user: int, groups: Iterable[int]) -> None:
    os.setgroups(list(groups))
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    # A process that gave up root without an exec owns no file in its /proc; a worker that was started as the user does.
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)
