"""Compares hard links: the names of one file in the source must be the names of one file in the clone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

_Inode = tuple[int, int]


class _Known(NamedTuple):
    """A file with several names, of one side."""

    #: The file of the other side under the first name, or None if the other side has no such name.
    partner: _Inode | None
    path: str
    links: int
    found: int


class LinkNames:
    """The names found so far. A file is dropped when all its names were found, which limits the memory."""

    def __init__(self) -> None:
        self._of_source: dict[_Inode, _Known] = {}
        self._of_clone: dict[_Inode, _Known] = {}

    def add_pair(self, path: str, ours: os.stat_result, theirs: os.stat_result) -> bool:
        """Add the name `path` of these two files. Returns whether all their names so far belong to this pair."""
        if ours.st_nlink == 1 and theirs.st_nlink == 1:
            return True
        source, clone = (ours.st_dev, ours.st_ino), (theirs.st_dev, theirs.st_ino)
        of_source = _add(self._of_source, source, clone, path, ours.st_nlink)
        of_clone = _add(self._of_clone, clone, source, path, theirs.st_nlink)
        return of_source and of_clone

    def source_of_earlier_name(self, theirs: os.stat_result) -> _Inode | None:
        """The file of the source under an earlier name of this file of the clone; None if there is no such name."""
        known = self._of_clone.get((theirs.st_dev, theirs.st_ino)) if theirs.st_nlink > 1 else None
        return known.partner if known is not None else None

    def add_extra(self, path: str, theirs: os.stat_result) -> None:
        """Add a name that only the clone has."""
        _add(self._of_clone, (theirs.st_dev, theirs.st_ino), None, path, theirs.st_nlink)

    def incomplete_of_clone(self) -> Iterator[tuple[str, int, int]]:
        """Yield (first path, st_nlink, names found) of each file of the clone that has more names than were found."""
        for known in sorted(self._of_clone.values(), key=lambda known: known.path):
            yield known.path, known.links, known.found


def _add(known: dict[_Inode, _Known], inode: _Inode, partner: _Inode | None, path: str, links: int) -> bool:
    before = known.pop(inode, _Known(partner, path, links, 0))
    now = before._replace(partner=before.partner or partner, found=before.found + 1)
    if now.found < links:
        known[inode] = now
    return partner is None or now.partner == partner
