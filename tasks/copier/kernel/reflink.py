"""FICLONE, and what each refusal means. The rows are those of design section 4; the facts behind them are
ioctl_ficlone(2), fs/remap_range.c, and the OpenZFS and btrfs threads that docs/reflink.md names."""

from __future__ import annotations

import errno
import time
from dataclasses import dataclass
from enum import Enum
from functools import cached_property

from tasks.copier.errors import errno_name
from tasks.copier.kernel import syscalls


class Answer(Enum):
    """What a refusal of FICLONE asks for."""

    #: This pair of filesystems cannot: fall back, and do not ask again for the pair within the fork.
    PAIR_CANNOT = "pair"
    #: This file cannot: fall back for it alone.
    FILE_CANNOT = "file"
    #: Not yet: ask again for a while.
    NOT_YET = "not yet"
    #: An error; a copy would not mend it, and retrying after it may corrupt (GNU coreutils NEWS 9.2).
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

#: How long EAGAIN and EINTR are met with another try, in seconds: an OpenZFS transaction group is written every 5 s.
RETRY_SECONDS = 6.0
_PAUSE_SECONDS = 0.05


def meaning(number: int) -> Answer:
    """What the errno of a failed FICLONE asks for; an unknown one is an error."""
    return _ANSWERS.get(number, Answer.ERROR)


@dataclass(frozen=True)
class Refusal:
    """A FICLONE that was not done: its errno, and whether the kernel was asked for this very file."""

    errno: int
    asked: bool = True

    @cached_property
    def reason(self) -> str:
        """Why the file was not reflinked, for its FileResult."""
        if self is NOT_ASKED_FOR:
            return "reflink=never"
        name = errno_name(self.errno)
        if not self.asked:
            return f"{name}: this pair of filesystems refused a reflink before"
        if meaning(self.errno) is Answer.PAIR_CANNOT:
            return f"{name}: this pair of filesystems cannot reflink"
        return f"{name}: this file cannot be reflinked"


#: What stands for a refusal where the caller wants real copies.
NOT_ASKED_FOR = Refusal(0, asked=False)


class Reflinker:
    """Reflinks the files of one fork, and remembers which pairs of filesystems cannot."""

    def __init__(self, refused: dict[tuple[int, int], int] | None = None) -> None:
        #: What a file of a pair (source dev, destination dev) that refused gets without being asked for.
        self._repeated = {pair: Refusal(number, asked=False) for pair, number in (refused or {}).items()}
        self._types: dict[int, int] = {}

    @property
    def refused(self) -> dict[tuple[int, int], int]:
        """The pairs that refused: (source dev, destination dev) → errno."""
        return {pair: refusal.errno for pair, refusal in self._repeated.items()}

    def clone(self, dst_fd: int, src_fd: int, src_dev: int, dst_dev: int) -> Refusal | None:
        """Make the empty file `dst_fd` a reflink of `src_fd`; None when done, or the refusal to fall back for.

        Raises OSError for an errno that a copy must not follow.
        """
        if self._repeated:
            repeated = self._repeated.get((src_dev, dst_dev))
            if repeated is not None:
                return repeated
        try:
            syscalls.ficlone(dst_fd, src_fd)
        except OSError as error:
            return self._refused(error, dst_fd, src_fd, src_dev, dst_dev)
        return None

    def _refused(self, error: OSError, dst_fd: int, src_fd: int, src_dev: int, dst_dev: int) -> Refusal | None:
        deadline = time.monotonic() + RETRY_SECONDS
        while meaning(error.errno or 0) is Answer.NOT_YET and time.monotonic() < deadline:
            time.sleep(_PAUSE_SECONDS)
            try:
                syscalls.ficlone(dst_fd, src_fd)
                return None
            except OSError as later:
                error = later
        number = error.errno or errno.EIO
        answer = meaning(number)
        if answer is Answer.ERROR:
            raise error
        if answer is Answer.PAIR_CANNOT and self._speaks_for_pair(number, dst_fd, src_fd, src_dev, dst_dev):
            self._repeated[src_dev, dst_dev] = Refusal(number, asked=False)
        return Refusal(number)

    def _speaks_for_pair(self, number: int, dst_fd: int, src_fd: int, src_dev: int, dst_dev: int) -> bool:
        """Whether the answer holds for all files of the pair.

        overlayfs hands the call to the real files below, so it can differ under one st_dev; OpenZFS answers EXDEV
        for a file whose block size differs from the destination's.
        """
        types = {self._type(src_dev, src_fd), self._type(dst_dev, dst_fd)}
        if syscalls.OVERLAYFS in types:
            return False
        return not (number == errno.EXDEV and syscalls.ZFS in types)

    def _type(self, dev: int, fd: int) -> int:
        if dev not in self._types:
            self._types[dev] = syscalls.filesystem_type(fd)
        return self._types[dev]
