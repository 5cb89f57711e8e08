"""The two ends of a fork: the source directory and the place of its destination, both opened once."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tasks.copier.errors import Code, ForkError
from tasks.copier.kernel import syscalls
from tasks.copier.kernel.processes import can_open, open_files_limit
from tasks.copier.roots import Roots, is_inside

#: Files that one fork has open at once at most: 15 were counted, early chunks in child processes included.
_FILES_OF_FORK = 20
#: Only below this limit of open files is it worth a look whether they can be opened.
_LOW_LIMIT = 256


@dataclass(frozen=True, slots=True)
class Endpoints:
    """Descriptors of the source and of the destination's parent; the paths are for messages and records only."""

    source: str
    destination: str
    source_fd: int
    parent_fd: int
    #: The destination's name in its parent.
    name: str

    def refuse_existing(self) -> None:
        """Raise ForkError destination_exists when anything stands at the destination, be it a dangling symlink."""
        try:
            os.stat(self.name, dir_fd=self.parent_fd, follow_symlinks=False)
        except FileNotFoundError:
            return
        raise destination_exists(self.destination)


def destination_exists(path: str) -> ForkError:
    """The error for a destination that is taken."""
    message = "the destination exists; it is never replaced or merged into"
    return ForkError(Code.DESTINATION_EXISTS, message, path, errno.EEXIST)


def refuse_too_few_files(destination: str) -> None:
    """Raise ForkError io_error (EMFILE) where this process can open so few files that a fork would fail midway."""
    if open_files_limit() < _LOW_LIMIT and not can_open(_FILES_OF_FORK):
        message = (
            f"this process can open fewer than {_FILES_OF_FORK} more files, which a fork needs; "
            "raise its limit of open files (ulimit -n, LimitNOFILE=)"
        )
        raise ForkError(Code.IO_ERROR, message, destination, errno.EMFILE)


@contextmanager
def open_endpoints(roots: Roots, source: str, destination: str) -> Iterator[Endpoints]:
    """Open both ends within the roots.

    Raises ForkError: invalid_request, outside_roots, source_not_found, source_not_directory,
    destination_inside_source, permission_denied, and io_error (EMFILE) where too few files can be opened to make a
    fork and to remove what is left of one that failed.
    """
    refuse_too_few_files(destination)
    source_fd = roots.open_source(source)
    try:
        with roots.open_parent(destination) as parent:
            if is_inside(parent.fd, os.fstat(source_fd)):
                message = "the destination lies inside the source"
                raise ForkError(Code.DESTINATION_INSIDE_SOURCE, message, destination)
            yield Endpoints(source, destination, source_fd, parent.fd, parent.name)
    finally:
        syscalls.release(source_fd)


@contextmanager
def reopen_endpoints(roots: Roots, source: str, destination: str, inode: int) -> Iterator[Endpoints]:
    """Open both ends of a fork that was planned before, whose source directory had the given inode.

    Raises ForkError: as `open_endpoints`, but source_changed for a source that is gone or replaced.
    """
    try:
        with open_endpoints(roots, source, destination) as ends:
            if os.fstat(ends.source_fd).st_ino != inode:
                raise ForkError(Code.SOURCE_CHANGED, "it was replaced while it was cloned", source)
            yield ends
    except ForkError as error:
        if error.code in (Code.SOURCE_NOT_FOUND, Code.SOURCE_NOT_DIRECTORY):
            message = "it was removed or replaced while it was cloned"
            raise ForkError(Code.SOURCE_CHANGED, message, source, error.errno) from None
        raise
