"""How long a fork will take, as a range: a sum of what its parts take.

    seconds = start + entries x per entry + extents to reflink x per extent + bytes to copy / rate

The rate and, for many or fragmented files, the seconds per entry and per extent are measured by the estimate itself, on
this filesystem at this moment (see `samples`). Where the source has too little for that, they are constants, measured
on XFS, btrfs, ext4 and tmpfs with two processors. The range covers what the machine's speed varies by from hour to
hour, and how well two processes share the work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

#: The smallest number of extents of a reflinked file that gives a figure per extent.
_LEAST_EXTENTS = 64


class Range(NamedTuple):
    """The least and the most seconds."""

    low: float
    high: float

    def __mul__(self, factor: object) -> Range:
        """The range for `factor` times as much."""
        assert isinstance(factor, int | float)
        return Range(self.low * factor, self.high * factor)


#: What a fork takes without any entry, and a snapshot: it commits a transaction of the filesystem.
_START = Range(0.001, 0.1)
_SNAPSHOT = Range(0.001, 0.5)
#: Per entry: the walk, creating it, its metadata, its FileResult. In a snapshot it is only read.
_ENTRY = Range(10e-6, 200e-6)
_SNAPSHOT_ENTRY = Range(2e-6, 60e-6)
#: Per extent of a reflink: XFS takes a transaction for each.
_EXTENT = Range(2e-6, 60e-6)
#: Factors for the seconds that a few small files took: two processes share the work; the walk and the close add to it.
_MEASURED_ENTRY = Range(0.25, 8.0)
#: Two files are reflinked in parallel at best; other work of the machine slows the rest down.
_MEASURED_EXTENT = Range(0.25, 6.0)
#: Factors for the seconds that a sample took: children share the copy; dirty pages are throttled at some point.
_MEASURED_COPY = Range(0.2, 6.0)
#: Seconds per byte where no sample was measured.
_BYTE = Range(1 / 8e9, 1 / 50e6)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What the estimate has measured: seconds per small file, per byte of a copy, per extent of a reflink; or None."""

    per_entry: float | None = None
    per_byte: float | None = None
    per_extent: float | None = None


def of_snapshot(entries: int) -> Range:
    """The seconds of a fork by a snapshot."""
    return _sum(_SNAPSHOT, _SNAPSHOT_ENTRY * entries)


def of_files(entries: int, extents: int, to_copy: int, measured: Measured) -> Range:
    """The seconds of a fork by files; `extents` of the files that are reflinked, `to_copy` bytes are copied."""
    extent = _EXTENT if measured.per_extent is None else _MEASURED_EXTENT * measured.per_extent
    byte = _BYTE if measured.per_byte is None else _MEASURED_COPY * measured.per_byte
    entry = _ENTRY
    if measured.per_entry is not None:
        entry = _MEASURED_ENTRY * measured.per_entry
        entry = Range(entry.low, max(entry.high, _ENTRY.high))  # a few files do not meet a full log or a commit
    return _sum(_START, entry * entries, extent * extents, byte * to_copy)


def per_extent(seconds: float, extents: int) -> float | None:
    """Seconds per extent, from one reflink; None if it has too few extents."""
    return seconds / extents if extents >= _LEAST_EXTENTS else None


def _sum(*ranges: Range) -> Range:
    return Range(sum(part.low for part in ranges), sum(part.high for part in ranges))
