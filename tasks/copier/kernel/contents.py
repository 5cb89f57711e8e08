"""Compares the bytes of two open files, and counts the bytes of a file that are data."""

from __future__ import annotations

import errno
import os

from tasks.copier.kernel import syscalls
from tasks.copier.kernel.sparse import hides_data

#: Bytes in one read.
_PIECE = 1 << 20


def first_difference(a_fd: int, b_fd: int, start: int, end: int) -> int | None:
    """The offset of the first byte in [start, end) in which two files differ, or None. Raises OSError.

    Skips ranges that are holes in both files. If both files end before `end`, the first byte that neither has is
    returned, since the rest was not compared.
    """
    for fd in (a_fd, b_fd):
        _make_holes_reliable(fd)
    at = start
    while at < end:
        data = min(_next_data(a_fd, at, end), _next_data(b_fd, at, end))
        if data >= end:
            shorter = min(os.fstat(fd).st_size for fd in (a_fd, b_fd))
            return None if shorter >= end else max(at, shorter)
        piece = min(_PIECE, end - data)
        ours, theirs = _read(a_fd, data, piece), _read(b_fd, data, piece)
        if ours != theirs:
            same = next((n for n, (x, y) in enumerate(zip(ours, theirs, strict=False)) if x != y), None)
            return data + (min(len(ours), len(theirs)) if same is None else same)
        if not ours:
            return data
        at = data + len(ours)
    return None


def data_bytes(fd: int, size: int, block: int = 1) -> int:
    """How many of the first `size` bytes of a file are in data extents, each extended to whole blocks of `block`.

    Returns `size` if the filesystem does not report holes. Raises OSError.
    """
    total = at = 0
    while at < size:
        data = _next_data(fd, at, size)
        if data >= size:
            break
        try:
            hole = os.lseek(fd, data, os.SEEK_HOLE)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            hole = size
        if hole <= data:  # it hides data
            hole = size
        begin, end = max(at, data // block * block), min(size, -(-hole // block) * block)
        total += end - begin
        at = end
    return total


def _make_holes_reliable(fd: int) -> None:
    """Make reported holes reliable. OpenZFS reports dirty data as holes until an fsync (issue 15526)."""
    if syscalls.filesystem_type(fd) == syscalls.ZFS:
        os.fsync(fd)


def _next_data(fd: int, at: int, end: int) -> int:
    """The offset of the next data at or after `at`, or `at` if the filesystem does not report holes, or hides data."""
    try:
        return os.lseek(fd, at, os.SEEK_DATA)
    except OSError as error:
        if error.errno != errno.ENXIO:
            return at
    return at if hides_data(fd, at) else end


def _read(fd: int, at: int, length: int) -> bytes:
    pieces = []
    while length:
        piece = os.pread(fd, length, at)
        if not piece:
            break
        pieces.append(piece)
        at, length = at + len(piece), length - len(piece)
    return b"".join(pieces)
