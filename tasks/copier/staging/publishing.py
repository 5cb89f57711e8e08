"""Whether the destination's filesystem can publish a fork: renameat2(2) with RENAME_NOREPLACE.

Many FUSE filesystems, NFS, 9p and CephFS refuse every flag of renameat2. A fork checks this before it copies anything.
"""

from __future__ import annotations

import errno
import os
import secrets
from contextlib import suppress

from tasks.copier.errors import Code, ForkError, from_oserror
from tasks.copier.kernel import syscalls

#: Filesystems with RENAME_NOREPLACE in every Linux that forkvm supports (5.6 and newer): they need no trial.
_SUPPORTED = frozenset({syscalls.XFS, syscalls.BTRFS, syscalls.EXT4, syscalls.TMPFS, syscalls.OVERLAYFS})
#: Errnos of a filesystem or kernel without the flag.
_REFUSED = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})


def require_noreplace(control_fd: int, destination: str) -> None:
    """Raise ForkError io_error if `destination` could not be published; see `noreplace_refusal`."""
    try:
        refusal = noreplace_refusal(control_fd)
    except OSError as error:
        raise from_oserror(error, "trying a rename in the staging directory", destination) from None
    if refusal is not None:
        raise cannot_publish(refusal, destination)


def noreplace_refusal(control_fd: int) -> OSError | None:
    """The error with which the filesystem of an open control directory refuses RENAME_NOREPLACE, or None.

    It is tried unless the filesystem is known to support it. Raises OSError if no file can be made.
    """
    return None if syscalls.filesystem_type(control_fd) in _SUPPORTED else try_noreplace(control_fd)


def try_noreplace(dir_fd: int) -> OSError | None:
    """Rename a new file in `dir_fd` with RENAME_NOREPLACE, and remove it: the error of the rename, or None.

    Raises OSError if no file can be made.
    """
    name = f"rename-{secrets.token_hex(4)}"  # batches of a campaign may try at the same time
    renamed = f"{name}.done"
    os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=dir_fd))
    try:
        syscalls.rename_noreplace(dir_fd, name, dir_fd, renamed)
    except OSError as error:
        return error
    finally:
        for left in (name, renamed):
            with suppress(OSError):
                os.unlink(left, dir_fd=dir_fd)
    return None


def cannot_publish(error: OSError, destination: str) -> ForkError:
    """The ForkError for a failed rename to `destination`, for any errno except EEXIST and ENOENT."""
    if error.errno not in _REFUSED:
        return from_oserror(error, "publishing it by a rename", destination)
    message = (
        f"the filesystem of {os.path.dirname(destination)} does not support renameat2(RENAME_NOREPLACE), which "
        "publishes a fork without replacing anything; choose a destination on XFS, btrfs, ext4, tmpfs or OpenZFS 2.2"
    )
    return ForkError(Code.IO_ERROR, message, destination, error.errno)
