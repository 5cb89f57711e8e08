"""One look into the files of a planned fork: their bytes and extents, and which of them are open for writing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from tasks.copier.kernel.extents import count_extents
from tasks.copier.kernel.leases import LeasesUnknown, is_open_for_writing
from tasks.copier.source.walk import Block, Entry, Kind
from tasks.copier.space.forecast import File, Forecast

#: The longest time for looking into files, in seconds. Those that are left are counted by what the walk knows of them.
LOOK_SECONDS = 5.0
#: In a source of many files, those of at most this many bytes are not opened: they have one extent and no holes.
_SMALL_BYTES = 64 << 10


@dataclass
class Counts:
    """The sums over all regular files, hard links once; sizes in bytes."""

    files: int = 0
    copied: int = 0
    logical: int = 0
    allocated: int = 0
    to_copy: int = 0
    #: Extents of all files, and of those that will be reflinked.
    extents: int = 0
    reflinked_extents: int = 0
    #: Whether every file was looked into that may have holes, several extents or a method of its own.
    is_complete: bool = True
    #: The file with the most extents, and their number.
    most_extents: tuple[int, str] = (0, "")
    #: The largest file that will be copied: its data, and its path.
    largest_copied: tuple[int, str] = (0, "")
    #: The first file that is open for writing; None if there is none, or if that cannot be known.
    open_file: str | None = None
    #: Regular files with names that the walk has not found: path → number of names.
    names_missing: dict[str, int] = field(default_factory=dict)
    #: Entries that need no inode in the fork: what is left out, and further names of files, except on tmpfs.
    without_inode: int = 0

    @property
    def reflinked(self) -> int:
        """Files that will be reflinked."""
        return self.files - self.copied


def count(forecast: Forecast, planned_dev: int, checkpoint: Callable[[], None], *, opens_all: bool) -> Counts:
    """Count the files of the manifest. `opens_all`: also small ones. Raises ForkError, OSError."""
    counts = Counts()
    deadline = time.monotonic() + LOOK_SECONDS

    def is_opened(entry: Entry, is_known: bool) -> bool:
        if not opens_all and entry.size <= _SMALL_BYTES and entry.data >= entry.size:
            return False
        if time.monotonic() < deadline:
            return True
        counts.is_complete = False
        return False

    for file in forecast.files(planned_dev, checkpoint, is_opened):
        _add(counts, forecast, file)
    return counts


def _add(counts: Counts, forecast: Forecast, file: File) -> None:
    entry = file.entry
    counts.files += 1
    counts.logical += entry.size
    counts.allocated += entry.data
    if entry.nlink > 1:
        counts.names_missing[file.path] = entry.nlink - 1
    data, extents = min(entry.size, entry.data), int(entry.data > 0)
    if file.fd >= 0:
        extents = forecast.read(file, lambda: count_extents(file.fd, entry.size))
        if counts.open_file is None and forecast.read(file, lambda: _is_open(file.fd)):
            counts.open_file = file.path
        if file.is_copied:
            data = forecast.data_of(file).bytes
    counts.extents += extents
    counts.most_extents = max(counts.most_extents, (extents, file.path))
    if file.is_copied:
        counts.copied += 1
        counts.to_copy += data
        counts.largest_copied = max(counts.largest_copied, (data, file.path))
    else:
        counts.reflinked_extents += extents


def count_names(counts: Counts, closing: Iterable[Block], *, on_tmpfs: bool) -> None:
    """Take the names that the walk has found off `names_missing`, and count the entries without an inode.

    `closing`: see `Workspace.blocks`. tmpfs counts each name as an inode (mm/shmem.c, shmem_link).
    """
    without = {Kind.SKIP} if on_tmpfs else {Kind.SKIP, Kind.HARDLINK}
    for block in closing:
        for entry in block.entries:
            if entry.kind == Kind.HARDLINK and entry.note in counts.names_missing:
                counts.names_missing[entry.note] -= 1
            counts.without_inode += entry.kind in without
    counts.names_missing = {path: number for path, number in counts.names_missing.items() if number > 0}


def _is_open(fd: int) -> bool:
    try:
        return is_open_for_writing(fd)
    except LeasesUnknown:
        return False
