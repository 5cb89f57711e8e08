"""FICLONE and the meaning of each errno that it fails with.

Sources: ioctl_ficlone(2), fs/remap_range.c, and the OpenZFS issues that docs/reflink.md names.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Collection
from enum import Enum

from tasks.copier.kernel import syscalls


class Answer(Enum):
    """What a failed FICLONE says about further attempts."""

    #: No file can be reflinked between these two filesystems.
    PAIR_CANNOT = "pair"
    #: This file cannot be reflinked. Others may be.
    FILE_CANNOT = "file"
    #: The file cannot be reflinked at this moment.
    NOT_YET = "not yet"
    #: An error. Do not copy instead: retrying after it may corrupt data (GNU coreutils NEWS 9.2).
    ERROR = "error"


_ANSWERS = {
    errno.EOPNOTSUPP: Answer.PAIR_CANNOT,
    errno.ENOTTY: Answer.PAIR_CANNOT,
    errno.ENOSYS: Answer.PAIR_CANNOT,
    errno.EXDEV: Answer.PAIR_CANNOT,
    errno.EINVAL: Answer.FILE_CANNOT,  # btrfs: a NOCOW file among COW ones; XFS: a realtime file
    errno.ETXTBSY: Answer.FILE_CANNOT,  # a swap file
    errno.EPERM: Answer.FILE_CANNOT,
    errno.EACCES: Answer.FILE_CANNOT,
    errno.EAGAIN: Answer.NOT_YET,  # OpenZFS: the blocks are still dirty
    errno.EINTR: Answer.NOT_YET,
}

#: How long EAGAIN and EINTR are retried, in seconds. OpenZFS writes a transaction group every 5 s.
RETRY_SECONDS = 6.0
_PAUSE_SECONDS = 0.05


def meaning(number: int) -> Answer:
    """The meaning of the errno of a failed FICLONE. An unknown errno is an error."""
    return _ANSWERS.get(number, Answer.ERROR)


def try_reflink(dst_fd: int, src_fd: int) -> int | None:
    """Make the empty file `dst_fd` a reflink of `src_fd`. Returns None, or the errno of a refusal.

    Retries EAGAIN and EINTR for `RETRY_SECONDS`. Raises OSError for an errno after which no copy must be made.
    """
    try:
        syscalls.ficlone(dst_fd, src_fd)
        return None
    except OSError as error:
        failure = error
    deadline = time.monotonic() + RETRY_SECONDS
    while meaning(failure.errno or 0) is Answer.NOT_YET and time.monotonic() < deadline:
        time.sleep(_PAUSE_SECONDS)
        try:
            syscalls.ficlone(dst_fd, src_fd)
            return None
        except OSError as error:
            failure = error
    number = failure.errno or errno.EIO
    if meaning(number) is Answer.ERROR:
        raise failure
    return number


def holds_for_pair(number: int, filesystem_types: Collection[int]) -> bool:
    """Whether the errno `number` of one file holds for all files of two filesystems of these types.

    overlayfs passes the call on to the files of its layers, so the answer can differ under one st_dev. OpenZFS answers
    EXDEV for a file whose block size differs from the destination's.
    """
    if meaning(number) is not Answer.PAIR_CANNOT or syscalls.OVERLAYFS in filesystem_types:
        return False
    return not (number == errno.EXDEV and syscalls.ZFS in filesystem_types)
