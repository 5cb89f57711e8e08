"""Whether hosts that share a filesystem share its locks too, checked when a worker starts and by `forkvm doctor`.

A worker places a marker on each filesystem that other hosts may use, and holds a lock on it. A worker on another host
that is granted the same lock knows that locks are not shared. It refuses to start.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass

from tasks.copier.errors import errno_name
from tasks.copier.kernel import mounts
from tasks.copier.staging.shared_filesystems import marked, prove
from worker.terminal.printing import printable

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
#: What an operator can do if locks are not shared.
REMEDY = (
    "mount it so that flock reaches the server (NFS: version 4, without nolock and local_lock; CIFS: without nobrl; "
    "FUSE: a filesystem that forwards flock), or serve it from one host and one mount"
)


class LocksNotShared(Exception):
    """Two processes hold the same lock. The text names the directory and the remedy."""


@dataclass(frozen=True)
class Locks:
    """Whether the locks of a filesystem that other hosts may use are shared."""

    #: True: shared with another host, or no lock is needed. False: not shared. None: unknown.
    shared: bool | None
    found: str


def shared_directories(roots: Iterable[str]) -> Iterator[str]:
    """Yield the roots and the mount points below them whose filesystems other hosts may use."""
    paths = [path for root in roots for path in (root, *mounts.mount_points_below(root))]
    for path in dict.fromkeys(paths):
        with suppress(OSError):  # missing or not accessible: no fork can be made in it
            fd = os.open(path, _DIRECTORY)
            try:
                if mounts.may_be_shared(fd):
                    yield path
            finally:
                os.close(fd)


def try_locks(path: str, held: ExitStack) -> Locks:
    """Check whether the locks in directory `path` are shared. Our marker stays there until `held` is closed."""
    try:
        fd = os.open(path, _DIRECTORY)
        held.callback(os.close, fd)
        options = mounts.local_lock_options(fd)
        proof = prove(held.enter_context(marked(fd)))
    except OSError as error:
        if error.errno == errno.EROFS:
            return Locks(True, "mounted read-only here: no fork is made in it, and no lock is needed")
        why = f"{error.strerror or error} ({errno_name(error.errno or 0)})"
        return Locks(None, f"other hosts may use this filesystem, and its locks (flock) cannot be checked: {why}")
    if proof.unfenced:
        hosts = ", ".join(proof.unfenced)
        return Locks(False, f"locks (flock) are not shared: a process on {hosts} holds one that was granted here too")
    if proof.fenced:
        return Locks(True, f"locks (flock) are shared with {', '.join(proof.fenced)}")
    found = (
        "other hosts may use this filesystem; only a worker on one of them shows whether its locks (flock) are shared"
    )
    if options:
        found += f". It is mounted with {', '.join(options)}, which keeps locks on this host"
    return Locks(None, found)


def place_markers(roots: Iterable[str], held: ExitStack) -> list[str]:
    """Place a marker in each shared directory until `held` is closed; returns warnings. Raises LocksNotShared."""
    warnings: list[str] = []
    for path in shared_directories(roots):
        locks = try_locks(path, held)
        if locks.shared is False:
            raise LocksNotShared(printable(f"{path}: {locks.found}; {REMEDY}"))
        if locks.shared is None:
            warnings.append(printable(f"{path}: {locks.found}"))
    return warnings
