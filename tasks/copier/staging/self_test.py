"""Finding out what a filesystem supports: a reflink, a rename and a lease in a staging of their own.

If the process dies meanwhile, `gc` removes that staging like the one of a fork that died before its journal.
"""

from __future__ import annotations

import os
import uuid
from dataclasses import dataclass

from tasks.copier.clone.reflinker import Reflinker, Refusal
from tasks.copier.kernel.leases import is_open_for_writing
from tasks.copier.staging.publishing import try_noreplace
from tasks.copier.staging.staging import Staging

_NEW_FILE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
#: Size in bytes of the file that is reflinked: several blocks, and too large for btrfs to keep it in its metadata.
_BYTES = 64 << 10


@dataclass(frozen=True)
class Support:
    """What the filesystem of a directory supports."""

    #: Why a file could not be reflinked, or None.
    refusal: Refusal | None
    #: The error of a rename with RENAME_NOREPLACE, or None.
    rename_error: OSError | None
    #: Why a read lease could not be taken, or None.
    lease_error: OSError | None


def probe_filesystem(directory_fd: int) -> Support:
    """Reflink a file in the open directory, rename one with RENAME_NOREPLACE, lease one, and remove all.

    Raises OSError if no file can be made (EROFS, EACCES, ENOSPC …), and NotOurs (a ForkError).
    """
    with Staging.claim(directory_fd, f"trial-{uuid.uuid4().hex}", 0) as staging:
        try:
            return Support(_reflink(staging.fd, staging.fd), try_noreplace(staging.fd), _lease(staging.fd))
        finally:
            staging.remove()


def probe_pair(source_fd: int, destination_fd: int) -> Refusal | None:
    """Reflink a file from one open directory to another, and remove both. Returns why it could not be, or None.

    Raises OSError if no file can be made in one of them, and NotOurs (a ForkError).
    """
    name = f"trial-{uuid.uuid4().hex}"
    with Staging.claim(source_fd, f"{name}-source", 0) as source, Staging.claim(destination_fd, name, 0) as destination:
        try:
            return _reflink(source.fd, destination.fd)
        finally:
            source.remove()
            destination.remove()


def _reflink(source_fd: int, destination_fd: int) -> Refusal | None:
    source = os.open("source", _NEW_FILE, 0o600, dir_fd=source_fd)
    try:
        os.write(source, b"forkvm\0\0" * (_BYTES // 8))
        clone = os.open("clone", _NEW_FILE, 0o600, dir_fd=destination_fd)
        try:
            return Reflinker().clone(clone, source, os.fstat(source).st_dev, os.fstat(clone).st_dev)
        finally:
            os.close(clone)
    finally:
        os.close(source)


def _lease(fd: int) -> OSError | None:
    """Lease the file that was reflinked."""
    source = os.open("source", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
    try:
        is_open_for_writing(source)
    except OSError as error:
        return error
    finally:
        os.close(source)
    return None
