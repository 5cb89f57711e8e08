"""The budget of a fork: the bytes that it may still copy, from `max_copied_bytes` of its request.

Bytes are taken from it before they are copied, so a fork never copies more. The chunks of a fork share one budget in a
file of its control directory: each chunk has a number there, the bytes that its latest try has taken.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager

from tasks.copier.clone.sparse_copy import Take
from tasks.copier.errors import Code, ForkError
from tasks.copier.kernel import syscalls
from tasks.copier.staging.parts import Parts

_FILE = "copied"
_NUMBER = struct.Struct("=q")


def take_all(count: int) -> bool:
    """The budget of a fork without `max_copied_bytes`."""
    return True


def budget_of(most: int | None) -> Take:
    """The budget of a fork that this process makes alone: at most `most` bytes, or all of them."""
    if most is None:
        return take_all
    taken = 0

    def take(count: int) -> bool:
        nonlocal taken
        if taken + count > most:
            return False
        taken += count
        return True

    return take


@contextmanager
def chunk_budget(staging: Parts, number: int, most: int | None) -> Iterator[Take]:
    """The budget of a fork for its chunk `number`, which the caller holds. What earlier tries took is given back.

    Raises OSError.
    """
    if most is None:
        yield take_all
        return
    # Its own descriptor: processes that share one share its lock.
    fd = staging.open_file(_FILE, create=True)
    try:
        at = number * _NUMBER.size
        os.pwrite(fd, _NUMBER.pack(0), at)
        yield lambda count: _take(fd, at, count, most)
    finally:
        syscalls.release(fd)


def _take(fd: int, at: int, count: int, most: int) -> bool:
    fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        data = os.pread(fd, os.fstat(fd).st_size, 0)
        if sum(taken for (taken,) in _NUMBER.iter_unpack(data)) + count > most:
            return False
        (taken,) = _NUMBER.unpack_from(data, at)
        os.pwrite(fd, _NUMBER.pack(taken + count), at)
        return True
    finally:
        fcntl.flock(fd, fcntl.LOCK_UN)


def refuse_excess(copied: int, most: int | None, path: str) -> None:
    """Raise ForkError copy_budget_exceeded if a complete fork has `copied` more than `most` bytes.

    That cannot happen unless the file of the budget was lost; then the fork must not be published.
    """
    if most is not None and copied > most:
        message = f"{copied} bytes were copied, more than max_copied_bytes ({most}) allows"
        raise ForkError(Code.COPY_BUDGET_EXCEEDED, message, path)
