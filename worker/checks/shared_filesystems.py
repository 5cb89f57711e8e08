"""The fence between hosts at a worker's start: markers where a filesystem may be shared, and the refusal to start."""

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
#: What an operator can do where locks are not shared.
REMEDY = (
    "mount it so that flock reaches the server (NFS: version 4, without nolock and local_lock; CIFS: without nobrl; "
    "FUSE: a filesystem that forwards flock), or serve it from one host and one mount"
)


class Unfenced(Exception):
    """Two processes hold one lock; the text says where, and what to do."""


@dataclass(frozen=True)
class Locks:
    """What is known of the locks of a filesystem that other hosts may use."""

    #: True: they are shared with another host; False: they are not; None: it could not be tried.
    shared: bool | None
    found: str


def shared_directories(roots: Iterable[str]) -> Iterator[str]:
    """The roots, and the mount points below them, whose filesystems other hosts may have mounted."""
    paths = [path for root in roots for path in (root, *mounts.mount_points_below(root))]
    for path in dict.fromkeys(paths):
        with suppress(OSError):  # not there, or not ours to open: no fork is made right in it
            fd = os.open(path, _DIRECTORY)
            try:
                if mounts.may_be_shared(fd):
                    yield path
            finally:
                os.close(fd)


def try_locks(path: str, held: ExitStack) -> Locks:
    """Try whether the locks in the directory `path` are shared; our marker stays there until `held` is closed."""
    try:
        fd = os.open(path, _DIRECTORY)
        held.callback(os.close, fd)
        options = mounts.local_lock_options(fd)
        proof = prove(held.enter_context(marked(fd)))
    except OSError as error:
        if error.errno == errno.EROFS:
            return Locks(True, "read-only here: no fork is made in it, and no lock is needed")
        why = f"{error.strerror or error} ({errno_name(error.errno or 0)})"
        return Locks(None, f"other hosts may use this filesystem, and no lock (flock) can be tried here: {why}")
    if proof.unfenced:
        hosts = ", ".join(proof.unfenced)
        return Locks(False, f"locks (flock) are not shared: a process on {hosts} holds one that was granted here too")
    if proof.fenced:
        return Locks(True, f"locks (flock) are shared: those held on {', '.join(proof.fenced)} are seen here")
    found = "other hosts may use this filesystem; whether they share its locks (flock) cannot be tried from here alone"
    if options:
        found += f", and it is mounted with {', '.join(options)}: locks stay on this host"
    return Locks(None, found)


def raise_fence(roots: Iterable[str], held: ExitStack) -> list[str]:
    """Keep a marker in each shared directory until `held` is closed; returns warnings. Raises Unfenced."""
    warnings: list[str] = []
    for path in shared_directories(roots):
        locks = try_locks(path, held)
        if locks.shared is False:
            raise Unfenced(printable(f"{path}: {locks.found}; {REMEDY}"))
        if locks.shared is None:
            warnings.append(printable(f"{path}: {locks.found}"))
    return warnings
