"""The source and the parent of the destination of a fork, each opened once."""

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

#: The most files that one fork has open at the same time: 15 were counted, with early chunks in child processes.
_FILES_OF_FORK = 20
#: Only below this RLIMIT_NOFILE is it checked whether they can be opened.
_LOW_LIMIT = 256


@dataclass(frozen=True, slots=True)
class Endpoints:
    """Descriptors of the source and of the destination's parent. The paths are for messages and records only."""

    source: str
    destination: str
    source_fd: int
    parent_fd: int
    #: The destination's name in its parent.
    name: str

    def parent_identity(self) -> tuple[int, int]:
        """Device and inode of the destination's parent."""
        status = os.fstat(self.parent_fd)
        return status.st_dev, status.st_ino

    def refuse_existing(self) -> None:
        """Raise ForkError destination_exists if anything is at the destination, even a dangling symlink."""
        try:
            os.stat(self.name, dir_fd=self.parent_fd, follow_symlinks=False)
        except FileNotFoundError:
            return
        raise destination_exists(self.destination)


def destination_exists(path: str) -> ForkError:
    """The error for a destination that exists."""
    message = "the destination exists and is not replaced; choose another path or remove it first"
    return ForkError(Code.DESTINATION_EXISTS, message, path, errno.EEXIST)


def refuse_too_few_files(destination: str) -> None:
    """Raise ForkError io_error (EMFILE) if this process cannot open as many files as a fork needs."""
    if open_files_limit() < _LOW_LIMIT and not can_open(_FILES_OF_FORK):
        message = (
            f"this process cannot open the {_FILES_OF_FORK} files that a fork needs; "
            "raise its limit of open files (ulimit -n, LimitNOFILE=)"
        )
        raise ForkError(Code.IO_ERROR, message, destination, errno.EMFILE)


@contextmanager
def open_endpoints(roots: Roots, source: str, destination: str) -> Iterator[Endpoints]:
    """Open the source and the destination's parent within the roots, and close them at the end.

    Raises ForkError: invalid_request, outside_roots, source_not_found, source_not_directory,
    destination_inside_source, permission_denied, and io_error (EMFILE) if the process cannot open enough files to make
    a fork and to clean up after a failed one.
    """
    refuse_too_few_files(destination)
    source_fd = roots.open_source(source)
    try:
        with roots.open_parent(destination) as parent:
            if is_inside(parent.fd, os.fstat(source_fd)):
                message = "the destination is inside the source; choose one outside it"
                raise ForkError(Code.DESTINATION_INSIDE_SOURCE, message, destination)
            yield Endpoints(source, destination, source_fd, parent.fd, parent.name)
    finally:
        syscalls.release(source_fd)


@contextmanager
def reopen_endpoints(roots: Roots, source: str, destination: str, inode: int) -> Iterator[Endpoints]:
    """Open the endpoints of a fork that is planned already. `inode` is the inode of its source at that time.

    Raises ForkError as `open_endpoints` does, but source_changed for a source that was removed or replaced.
    """
    try:
        with open_endpoints(roots, source, destination) as ends:
            if os.fstat(ends.source_fd).st_ino != inode:
                raise ForkError(Code.SOURCE_CHANGED, "the source was replaced while it was being cloned", source)
            yield ends
    except ForkError as error:
        if error.code in (Code.SOURCE_NOT_FOUND, Code.SOURCE_NOT_DIRECTORY):
            message = "the source was removed or replaced while it was being cloned"
            raise ForkError(Code.SOURCE_CHANGED, message, source, error.errno) from None
        raise
