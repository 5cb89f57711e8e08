"""What a filesystem can do for forks, found out by doing it once in a staging of its own.

A process that dies meanwhile leaves what any fork leaves that died before its journal, and `gc` removes it.
"""

from __future__ import annotations

import os
import uuid
from dataclasses import dataclass

from tasks.copier.clone.reflinker import Reflinker, Refusal
from tasks.copier.staging.publishing import try_noreplace
from tasks.copier.staging.staging import Staging

_NEW_FILE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
#: Bytes of the file that is reflinked: some blocks of any filesystem, and more than btrfs keeps in its metadata.
_BYTES = 64 << 10


@dataclass(frozen=True)
class Trial:
    """What came of it."""

    #: Why a file was not reflinked; None when it was.
    refusal: Refusal | None
    #: What a rename that must not replace anything answered; None when it was done.
    rename_error: OSError | None


def try_out(directory_fd: int) -> Trial:
    """Reflink a file in the open directory, publish it by a rename, and remove everything again.

    Raises OSError where not even a file can be made (EROFS, EACCES, ENOSPC …).
    """
    with Staging.claim(directory_fd, f"trial-{uuid.uuid4().hex}", 0) as staging:
        try:
            return Trial(_reflink(staging.fd), try_noreplace(staging.fd))
        finally:
            staging.remove()


def _reflink(fd: int) -> Refusal | None:
    source = os.open("source", _NEW_FILE, 0o600, dir_fd=fd)
    try:
        os.write(source, b"forkvm\0\0" * (_BYTES // 8))
        clone = os.open("clone", _NEW_FILE, 0o600, dir_fd=fd)
        try:
            device = os.fstat(source).st_dev
            return Reflinker().clone(clone, source, device, device)
        finally:
            os.close(clone)
    finally:
        os.close(source)
