"""Whether two open files hold the same bytes."""

from __future__ import annotations

import errno
import os

#: Bytes read at a time from each side.
_PIECE = 1 << 20


def first_difference(a_fd: int, b_fd: int, start: int, end: int) -> int | None:
    """The offset of the first byte in [start, end) in which two files differ, or None. Raises OSError.

    Reads what is data on either side; two holes need no reading.
    """
    at = start
    while at < end:
        data = min(_next_data(a_fd, at, end), _next_data(b_fd, at, end))
        if data >= end:
            return None
        piece = min(_PIECE, end - data)
        ours, theirs = _read(a_fd, data, piece), _read(b_fd, data, piece)
        if ours != theirs:
            same = next((n for n, (x, y) in enumerate(zip(ours, theirs, strict=False)) if x != y), None)
            return data + (min(len(ours), len(theirs)) if same is None else same)
        if not ours:
            return None
        at = data + len(ours)
    return None


def _next_data(fd: int, at: int, end: int) -> int:
    """Where the next data at or after `at` begins; `at` itself where the filesystem cannot tell."""
    try:
        return os.lseek(fd, at, os.SEEK_DATA)
    except OSError as error:
        return end if error.errno == errno.ENXIO else at


def _read(fd: int, at: int, length: int) -> bytes:
    pieces = []
    while length:
        piece = os.pread(fd, length, at)
        if not piece:
            break
        pieces.append(piece)
        at, length = at + len(piece), length - len(piece)
    return b"".join(pieces)
