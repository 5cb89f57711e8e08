"""The files of a planned fork that will be copied, and their bytes, as far as that is known before they are.

A file will be copied if the request wants no reflinks, if its pair of filesystems or the file itself has refused one,
or if it is NOCOW on btrfs and the files that were reflinked are not, or the other way round (FICLONE: EINVAL).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

from tasks.copier.clone.file import Cloner, DirectoryPair
from tasks.copier.clone.zeros import BLOCK
from tasks.copier.errors import Code, ForkError, from_source
from tasks.copier.kernel import syscalls
from tasks.copier.kernel.sparse import HolesUnknown, data_extents
from tasks.copier.source.walk import Entry, Kind, join
from tasks.copier.staging.workspace import Workspace

T = TypeVar("T")


class Data(NamedTuple):
    """The bytes that a copy of a file writes, or about so many if they are not `exact`."""

    bytes: int
    exact: bool


class File(NamedTuple):
    """A file of the source, and whether it will be copied. `fd` is open until the next file; -1 if it is not open."""

    path: str
    entry: Entry
    fd: int
    is_copied: bool


class Forecast:
    """What a planned fork will do with its files."""

    def __init__(
        self,
        work: Workspace,
        cloner: Cloner,
        reflinked: Collection[str],
        refused: Collection[str],
        *,
        is_guess: bool = False,
    ) -> None:
        """`cloner` has tried the reflinks; `reflinked` and `refused` are the paths of files for which it did.

        `is_guess`: where all tries were refused, say that every file will be copied, although one may be reflinked.
        """
        self._work, self._cloner, self._refused = work, cloner, refused
        self._copies_all = work.options.reflink == "never" or (is_guess and bool(refused) and not reflinked)
        #: Whether the files that can be reflinked are NOCOW; None if it does not matter.
        self._nocow = self._nocow_of(next(iter(reflinked), None))

    @property
    def copies_any(self) -> bool:
        """Whether any file is known to be copied."""
        return self._copies_all or bool(self._refused or self._cloner.reflinker.refused) or self._nocow is not None

    def allocated(self, planned_dev: int) -> int:
        """The bytes that the source has allocated for the files that are known to be copied, without opening them.

        It is more than a copy writes if a file has preallocated blocks. Raises ForkError.
        """
        blocks = self._work.blocks(planned_dev)
        return sum(
            entry.data
            for block in blocks
            for entry in block.entries
            if entry.kind == Kind.FILE and self._is_known(join(block.path, entry.name), entry)
        )

    def copied(self, planned_dev: int, checkpoint: Callable[[], None]) -> Iterator[File]:
        """Yield the regular files of the manifest that will be copied.

        `planned_dev`: see `Workspace.blocks`. `checkpoint` is called regularly and raises to end. Raises ForkError.
        """
        look = self._nocow is not None
        files = self.files(planned_dev, checkpoint, lambda entry, is_known: is_known or look)
        return (file for file in files if file.is_copied)

    def files(
        self, planned_dev: int, checkpoint: Callable[[], None], is_opened: Callable[[Entry, bool], bool]
    ) -> Iterator[File]:
        """Yield all regular files of the manifest; see `copied`.

        `is_opened`: whether a file is to be opened; its argument `is_known` says that it is known to be copied.
        """
        for block in self._work.blocks(planned_dev):
            checkpoint()
            with self._directory(block.path) as place:
                for entry in block.entries:
                    if entry.kind == Kind.FILE:
                        path = join(block.path, entry.name)
                        is_known = self._is_known(path, entry)
                        if is_opened(entry, is_known):
                            yield from self._open(place, entry, path, is_known=is_known)
                        else:
                            yield File(path, entry, -1, is_known)

    @contextmanager
    def _directory(self, path: str) -> Iterator[DirectoryPair]:
        """Open a directory of the source. The tree need not have it yet. Raises ForkError."""
        ends, src_fd = self._work.ends, self._work.open_source(path)
        try:
            yield DirectoryPair(src_fd, -1, self._work.tree_dev, path, ends.source, ends.destination)
        finally:
            os.close(src_fd)

    def read(self, file: File, call: Callable[[], T]) -> T:
        """What `call` reads of the file. Raises ForkError where it raises OSError."""
        try:
            return call()
        except OSError as error:
            path = join(self._work.ends.source, file.path)
            raise from_source(error, "reading where the data of the file is", path) from None

    def data_of(self, file: File) -> Data:
        """The bytes that a copy of an open file writes. Raises ForkError.

        Where the filesystem reports no holes, the copy finds them by reading (`tasks.copier.clone.sparse_copy`), and
        its bytes are about those that are allocated.
        """
        return self.read(file, lambda: _data_of(file))

    def exceeds(self, most: int, file: File) -> ForkError:
        """The error of a fork that would copy more than `most` bytes, which was found out at `file`."""
        refusal, why = self._cloner.fallback, "reflink=never"
        if not self._copies_all:
            why = refusal["reason"] if refusal is not None else "this file cannot be reflinked"
        message = f"the fork would copy more than its max_copied_bytes ({most}): {why}"
        number = refusal["errno"] if refusal is not None else None
        return ForkError(Code.COPY_BUDGET_EXCEEDED, message, join(self._work.ends.source, file.path), number)

    def _is_known(self, path: str, entry: Entry) -> bool:
        """Whether the file is copied for a reason that is known without opening it."""
        pair = entry.dev, self._work.tree_dev
        return self._copies_all or path in self._refused or pair in self._cloner.reflinker.refused

    def _open(self, place: DirectoryPair, entry: Entry, path: str, *, is_known: bool) -> Iterator[File]:
        fd = self._cloner.open_source(place, entry)
        try:
            file = File(path, entry, fd, is_known)
            if not is_known and self._nocow is not None:
                file = file._replace(is_copied=self.read(file, lambda: _is_nocow(fd)) is not self._nocow)
            yield file
        finally:
            self._cloner.close_source(fd)

    def _nocow_of(self, path: str | None) -> bool | None:
        if path is None or syscalls.filesystem_type(self._work.tree_fd) != syscalls.BTRFS:
            return None
        directory, _, name = path.rpartition("/")
        fd = self._work.open_tree(directory)
        try:
            clone_fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
            try:
                return _is_nocow(clone_fd)
            finally:
                os.close(clone_fd)
        except OSError:
            return None
        finally:
            os.close(fd)


def _is_nocow(fd: int) -> bool:
    return bool(syscalls.file_flags(fd) & syscalls.FS_NOCOW_FL)


def _data_of(file: File) -> Data:
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
