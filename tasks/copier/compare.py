"""Comparing a directory with its clone, and counting the bytes that they share on disk."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from tasks.copier import syscalls, trees
from tasks.copier.errors import ForkError, from_oserror
from tasks.copier.selection import Selection
from tasks.copier.walk import Entry, Kind, Walk, file_type, join

#: Bytes read at a time from each side.
_PIECE = 1 << 20
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_SHARED_UNKNOWN = syscalls.FIEMAP_EXTENT_UNKNOWN | syscalls.FIEMAP_EXTENT_DATA_INLINE


class Difference(NamedTuple):
    """What differs at one relative path."""

    path: str
    what: str


@dataclass
class Comparison:
    """What `compare` found. Bytes are of the clone's regular files."""

    entries: int = 0
    differences: list[Difference] = field(default_factory=list)
    bytes_logical: int = 0
    #: On disk, of extents that are data; and of these, what other files share.
    bytes_mapped: int = 0
    bytes_shared: int = 0
    #: Files whose sharing the filesystem could not tell (no FIEMAP).
    unmapped_files: int = 0


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
