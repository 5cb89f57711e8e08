"""The files of a planned fork that will be copied, and their bytes, as far as that is known before they are.

A file will be copied if the request wants no reflinks, if its pair of filesystems or the file itself has refused one,
or if it is NOCOW on btrfs and the files that were reflinked are not, or the other way round (FICLONE: EINVAL).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

from tasks.copier.clone.file import Cloner, DirectoryPair
from tasks.copier.clone.zeros import BLOCK
from tasks.copier.errors import Code, ForkError, from_source
from tasks.copier.kernel import syscalls
from tasks.copier.kernel.sparse import HolesUnknown, data_extents
from tasks.copier.source.walk import Entry, Kind, join
from tasks.copier.staging.workspace import Workspace


class Data(NamedTuple):
    """The bytes that a copy of a file writes, or about so many if they are not `exact`."""

    bytes: int
    exact: bool


class File(NamedTuple):
    """A file of the source, open as `fd` until the next one, and whether it will be copied."""

    path: str
    entry: Entry
    fd: int
    is_copied: bool


class Forecast:
    """What a planned fork will do with its files."""

    def __init__(self, work: Workspace, cloner: Cloner, reflinked: Collection[str], refused: Collection[str]) -> None:
        """`cloner` has tried the reflinks; `reflinked` and `refused` are the paths of files for which it did."""
        self._work, self._cloner, self._refused = work, cloner, refused
        self._copies_all = work.options.reflink == "never"
        #: Whether the files that can be reflinked are NOCOW; None if it does not matter.
        self._nocow = self._nocow_of(next(iter(reflinked), None))

    def files(self, planned_dev: int, checkpoint: Callable[[], None], *, only_copied: bool = False) -> Iterator[File]:
        """Yield the regular files of the manifest; `only_copied`: only those that will be copied.

        `planned_dev`: see `Workspace.blocks`. `checkpoint` is called regularly and raises to end. Raises ForkError.
        """
        for block in self._work.blocks(planned_dev):
            checkpoint()
            with self._work.place(block.path) as place:
                for entry in block.entries:
                    if entry.kind == Kind.FILE:
                        yield from self._open(place, entry, only_copied=only_copied)

    def exceeds(self, most: int, file: File) -> ForkError:
        """The error of a fork that would copy more than `most` bytes, which was found out at `file`."""
        refusal, why = self._cloner.fallback, "reflink=never"
        if not self._copies_all:
            why = refusal["reason"] if refusal is not None else "this file cannot be reflinked"
        message = f"the fork would copy more than its max_copied_bytes ({most}): {why}"
        number = refusal["errno"] if refusal is not None else None
        return ForkError(Code.COPY_BUDGET_EXCEEDED, message, join(self._work.ends.source, file.path), number)

    def _open(self, place: DirectoryPair, entry: Entry, *, only_copied: bool) -> Iterator[File]:
        path = join(place.path, entry.name)
        known = (
            self._copies_all or path in self._refused or (entry.dev, place.dst_dev) in self._cloner.reflinker.refused
        )
        if only_copied and not known and self._nocow is None:
            return
        fd = self._cloner.open_source(place, entry)
        try:
            is_copied = known or (self._nocow is not None and syscalls.is_nocow(fd) is not self._nocow)
            if is_copied or not only_copied:
                yield File(path, entry, fd, is_copied)
        except OSError as error:
            raise from_source(error, "reading where its data is", place.source_of(entry.name)) from None
        finally:
            os.close(fd)

    def _nocow_of(self, path: str | None) -> bool | None:
        if path is None or syscalls.filesystem_type(self._work.tree_fd) != syscalls.BTRFS:
            return None
        directory, _, name = path.rpartition("/")
        fd = self._work.open_tree(directory)
        try:
            clone_fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
            try:
                return syscalls.is_nocow(clone_fd)
            finally:
                os.close(clone_fd)
        except OSError:
            return None
        finally:
            os.close(fd)


def data_of(file: File) -> Data:
    """The bytes that a copy of the file writes. Raises OSError.

    Where the filesystem reports no holes, the copy finds them by reading (`tasks.copier.clone.sparse_copy`), and its
    bytes are about those that are allocated.
    """
    entry, total = file.entry, 0
    is_zfs = syscalls.filesystem_type(file.fd) == syscalls.ZFS
    try:
        if is_zfs:  # see `SparseCopier.copy`
            os.fsync(file.fd)
        for start, end in data_extents(file.fd, 0, entry.size):
            if (start, end) == (0, entry.size) and entry.size - entry.data >= BLOCK and not is_zfs:
                return Data(entry.data, exact=False)
            total += end - start
    except HolesUnknown:  # the fork fails with sparse_unsupported
        return Data(0, exact=False)
    return Data(total, exact=True)
