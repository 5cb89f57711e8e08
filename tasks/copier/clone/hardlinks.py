"""Whether the names of one file in a source are the names of one file in its clone, and of no file elsewhere."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

_Inode = tuple[int, int]


class _Known(NamedTuple):
    """A file of one side with several names."""

    #: The file of the other side that the first name led to; None where that name is an additional one.
    partner: _Inode | None
    path: str
    links: int
    met: int


class LinkNames:
    """The names met so far. A file is forgotten when all its names were met, which bounds the memory."""

    def __init__(self) -> None:
        self._of_source: dict[_Inode, _Known] = {}
        self._of_clone: dict[_Inode, _Known] = {}

    def agree(self, path: str, ours: os.stat_result, theirs: os.stat_result) -> bool:
        """Note that `path` is a name of these two files; whether all names of both so far led to this pair."""
        if ours.st_nlink == 1 and theirs.st_nlink == 1:
            return True
        source, clone = (ours.st_dev, ours.st_ino), (theirs.st_dev, theirs.st_ino)
        of_source = _meet(self._of_source, source, clone, path, ours.st_nlink)
        of_clone = _meet(self._of_clone, clone, source, path, theirs.st_nlink)
        return of_source and of_clone

    def meet_extra(self, path: str, theirs: os.stat_result) -> None:
        """Note a name that only the clone has."""
        _meet(self._of_clone, (theirs.st_dev, theirs.st_ino), None, path, theirs.st_nlink)

    def unmet_of_clone(self) -> Iterator[tuple[str, int, int]]:
        """Yield (first path, number of names, number of names met) of each file of the clone with names not met."""
        for known in sorted(self._of_clone.values(), key=lambda known: known.path):
            yield known.path, known.links, known.met


def _meet(known: dict[_Inode, _Known], inode: _Inode, partner: _Inode | None, path: str, links: int) -> bool:
    before = known.pop(inode, _Known(partner, path, links, 0))
    now = before._replace(partner=before.partner or partner, met=before.met + 1)
    if now.met < links:
        known[inode] = now
    return partner is None or now.partner == partner
