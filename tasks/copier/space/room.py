"""The room for one fork: whether the destination's filesystem has as many free bytes as the fork will copy.

It is compared with the free space before the fork copies anything, less what other forks of this host will still copy
there (see `reservation`). Not compared are filesystems that compress or that report no size, and a few bytes: there
only a failed write shows it. Limits: quotas of users, and blocks that are reserved for root, do not count as free.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass, field

from tasks.copier.clone.sparse_copy import Step
from tasks.copier.errors import Code, ForkError
from tasks.copier.kernel.free_space import filesystem_id, free_bytes, may_compress
from tasks.copier.space import reservation
from tasks.copier.space.reservation import Copied, Reservation, reserve, reserved_by_others, reserving

#: Copies of fewer bytes than this are neither compared nor reserved: that takes longer than the copy.
_LEAST_BYTES = 1 << 20


@dataclass
class Room:
    """What one job may take of the filesystem of the open directory `tree_fd`, in which `destination` is made."""

    tree_fd: int
    destination: str
    #: The name of its reservation, and whether other processes continue the job; see `reservation`.
    job: str
    is_queued: bool = False
    reservation: Reservation | None = None
    #: The free bytes before the job copied anything; None if they are not compared.
    _free: int | None = None
    _is_measured: bool = field(default=False)
    _others: int = 0

    def counted(self, step: Step) -> Step:
        """`step`, but it also counts for the reservation what this process copies, in a job without chunks."""
        copied = Copied()

        def count(number: int) -> None:
            if self.reservation is not None:
                copied.add(number, self.reservation)
            step(number)

        return count

    def take(self, total: int) -> bool:
        """Reserve `total` bytes in all for the job. Returns False if it has no room for them. Raises OSError."""
        if total < _LEAST_BYTES:
            return True
        if not self._is_measured:
            self._is_measured = True
            self._free = None if may_compress(self.tree_fd) else free_bytes(self.tree_fd)
        if self._free is None:
            return True
        with reserving():
            self._others = reserved_by_others(filesystem_id(self.tree_fd), self.job)
            if total > self._free - self._others:
                return False
            if self.reservation is None:
                self.reservation = reserve(self.job, filesystem_id(self.tree_fd), total, is_queued=self.is_queued)
            else:
                self.reservation.set_total(total)
        return True

    def require(self, most: int, exact: Callable[[], int]) -> None:
        """Reserve what the job will copy: at most `most` bytes; `exact` counts them, which takes longer.

        Raises ForkError no_space, and OSError.
        """
        if self.take(most):
            return
        count = exact()
        if not self.take(count):
            raise self.refusal(count, self.destination)

    def refusal(self, count: int, path: str, beside: int = 0) -> ForkError:
        """The error of a fork at `path` that would copy `count` bytes, for which there is no room.

        `beside`: what the other forks of the same batch will copy.
        """
        others = self._others + beside
        needed = f"; other forks of this host will take {others} of them" if others else ""
        message = f"{count} bytes are to be copied, and the filesystem has {self._free} bytes free{needed}"
        return ForkError(Code.NO_SPACE, message, path, errno.ENOSPC)

    def leave(self) -> None:
        """Give back what is reserved."""
        reservation.withdraw(self.job)
        if self.reservation is not None:
            self.reservation.close()
            self.reservation = None
