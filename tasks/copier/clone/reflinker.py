"""Reflinks for the files of one fork, with a memory of the filesystems that cannot reflink."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from tasks.copier.errors import errno_name
from tasks.copier.kernel import syscalls
from tasks.copier.kernel.reflink import Answer, holds_for_pair, meaning, try_reflink


@dataclass(frozen=True)
class Refusal:
    """Why a file was not reflinked: the errno, and whether FICLONE was called for this very file."""

    errno: int
    asked: bool = True

    @cached_property
    def reason(self) -> str:
        """The `reason` of the FileResult."""
        if self is NOT_ASKED_FOR:
            return "reflink=never"
        name = errno_name(self.errno)
        if not self.asked:
            return f"{name}: this pair of filesystems refused a reflink before"
        if meaning(self.errno) is Answer.PAIR_CANNOT:
            return f"{name}: this pair of filesystems cannot reflink"
        return f"{name}: this file cannot be reflinked"


#: The refusal for a request with `reflink: never`.
NOT_ASKED_FOR = Refusal(0, asked=False)


class Reflinker:
    """Reflinks the files of one fork, and calls FICLONE only once for a pair of filesystems that cannot reflink."""

    def __init__(self, refused: dict[tuple[int, int], int] | None = None) -> None:
        """`refused`: pairs (source st_dev, destination st_dev) that cannot reflink, each with its errno."""
        #: The refusal for every further file of a pair (source st_dev, destination st_dev).
        self._repeated = {pair: Refusal(number, asked=False) for pair, number in (refused or {}).items()}
        #: st_dev → f_type.
        self._types: dict[int, int] = {}

    @property
    def refused(self) -> dict[tuple[int, int], int]:
        """The pairs that cannot reflink: (source st_dev, destination st_dev) → errno."""
        return {pair: refusal.errno for pair, refusal in self._repeated.items()}

    def clone(self, dst_fd: int, src_fd: int, src_dev: int, dst_dev: int) -> Refusal | None:
        """Make the empty file `dst_fd` a reflink of `src_fd`. Returns None, or the refusal after which to copy.

        Raises OSError for an errno after which no copy must be made.
        """
        if self._repeated:
            repeated = self._repeated.get((src_dev, dst_dev))
            if repeated is not None:
                return repeated
        number = try_reflink(dst_fd, src_fd)
        if number is None:
            return None
        if holds_for_pair(number, {self._type(src_dev, src_fd), self._type(dst_dev, dst_fd)}):
            self._repeated[src_dev, dst_dev] = Refusal(number, asked=False)
        return Refusal(number)

    def _type(self, dev: int, fd: int) -> int:
        if dev not in self._types:
            self._types[dev] = syscalls.filesystem_type(fd)
        return self._types[dev]
