"""The pace of this machine and filesystem at this moment, from a few things that the fork will do, done and timed."""

from __future__ import annotations

import errno
import os
import time
from statistics import median

from tasks.copier.clone.file import Cloner
from tasks.copier.clone.sparse_copy import OpenPair, Part, SparseCopier
from tasks.copier.clone.write_behind import WriteBehind
from tasks.copier.errors import Code, ForkError
from tasks.copier.estimate import duration
from tasks.copier.estimate.duration import Measured
from tasks.copier.fork.reflink_probe import Probed
from tasks.copier.kernel.extents import count_extents
from tasks.copier.kernel.sparse import data_extents
from tasks.copier.options import Options
from tasks.copier.report import Report, unpack_pages
from tasks.copier.source.walk import Kind
from tasks.copier.staging.workspace import Workspace

#: Bytes that are copied to measure the rate of a copy, if the largest file that will be copied has so many.
_SAMPLE_BYTES = 32 << 20
#: Files that are cloned to measure the time of one, each of at most so many bytes; and the fewest that suffice.
_SAMPLE_FILES, _LEAST_FILES = 100, 20
_SMALL_BYTES = 64 << 10


def measure(
    work: Workspace, cloner: Cloner, probed: Probed, report: Report, largest_copied: tuple[int, str]
) -> Measured:
    """Clone samples into the tree, which is removed afterwards. `report` is the probe's. Raises ForkError, OSError."""
    return Measured(
        per_entry=_per_entry(work, cloner, probed),
        per_byte=_per_byte(work, largest_copied),
        per_extent=_per_extent(work, probed, report),
    )


def _per_entry(work: Workspace, cloner: Cloner, probed: Probed) -> float | None:
    """Seconds for one small file, the median: a process that had to wait for the processor does not count. None if few.

    Raises ForkError.
    """
    seconds: list[float] = []
    done = {path.rpartition("/")[2] for path in probed.cloned}
    for block in work.blocks(work.source_dev):
        with work.place(block.path) as place:
            for entry in block.entries:
                is_small = entry.kind == Kind.FILE and entry.size <= _SMALL_BYTES and entry.dev == work.source_dev
                if not is_small or entry.name in done:
                    continue
                began = time.perf_counter()
                try:
                    cloner.file(place, entry)
                except ForkError as error:
                    if error.code is Code.NO_SPACE:
                        return None
                    raise
                seconds.append(time.perf_counter() - began)
                if len(seconds) == _SAMPLE_FILES:
                    return median(seconds)
    return median(seconds) if len(seconds) >= _LEAST_FILES else None


def _per_extent(work: Workspace, probed: Probed, report: Report) -> float | None:
    """Seconds per extent of the reflink that the probe has timed, if that is enough to know."""
    results = {result["path"]: result for result in unpack_pages(report.close())}
    for path in probed.cloned:
        directory, _, name = path.rpartition("/")
        fd = work.open_tree(directory)
        try:
            clone_fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
            try:
                return duration.per_extent(results[path]["seconds"], count_extents(clone_fd, results[path]["bytes"]))
            finally:
                os.close(clone_fd)
        finally:
            os.close(fd)
    return None


def _per_byte(work: Workspace, largest: tuple[int, str]) -> float | None:
    """Seconds per byte of a copy, from a part of the largest file that will be copied; None if it cannot be measured.

    The part is copied into a file without a name, which ends with its descriptor.
    """
    data, path = largest
    if data < _SAMPLE_BYTES:
        return None
    directory, _, name = path.rpartition("/")
    try:
        with work.place(directory) as place:
            src_fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=place.src_fd)
            try:
                return _time_sample(src_fd, work.tree_fd, work.options)
            finally:
                os.close(src_fd)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.ENOENT):
            return None
        raise


def _time_sample(src_fd: int, tree_fd: int, options: Options) -> float | None:
    status, drops = os.fstat(src_fd), options.cache == "drop"
    copier = SparseCopier(offload=options.reflink != "never", drops=drops)
    dst_fd = os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=tree_fd)
    try:
        os.ftruncate(dst_fd, status.st_size)
        copied, began = 0, time.perf_counter()
        for start, end in data_extents(src_fd, 0, status.st_size):
            end = min(end, start + _SAMPLE_BYTES - copied)
            behind = WriteBehind(dst_fd, start, drops=drops)
            pair = OpenPair(src_fd, status.st_dev, dst_fd, lambda: ("", ""), lambda count: None, behind)
            copied += copier.copy(pair, Part(start, end, status.st_size, status.st_blocks * 512))
            if copied >= _SAMPLE_BYTES:
                break
        return (time.perf_counter() - began) / copied if copied else None
    except ForkError:
        return None
    finally:
        os.close(dst_fd)
