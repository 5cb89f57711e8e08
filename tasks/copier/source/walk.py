"""Reading the source once: every entry with its identity, in blocks, directory by directory."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

from tasks.copier.errors import Code, ForkError, from_oserror, from_source
from tasks.copier.kernel import trees
from tasks.copier.source.selection import Selection

#: Entries a block at most: bounds what is in memory while a directory of a million files is read.
BLOCK_ENTRIES = 2_000


class Kind(IntEnum):
    """What an entry of the source is to the fork."""

    FILE = 0
    SYMLINK = 1
    DIRECTORY = 2
    #: A further name of a file that the walk met before; `note` is the first name's path.
    HARDLINK = 3
    #: Left out; `note` tells why.
    SKIP = 4


class Entry(NamedTuple):
    """One entry of the source. dev, ino, size, mtime and ctime are its identity: they change when it does."""

    name: str
    note: str
    kind: int
    mode: int
    uid: int
    gid: int
    dev: int
    ino: int
    nlink: int
    size: int  # bytes
    data: int  # bytes allocated; the rest is holes
    atime: int  # nanoseconds, as are the next two
    mtime: int
    ctime: int

    def is_still(self, status: os.stat_result) -> bool:
        """Whether `status`, read later, is that of the same, unchanged entry.

        Owner and mode are compared although a change of them moves ctime: this entry may come from a manifest that
        somebody else wrote, and what a clone gets of them is then what the source has.
        """
        return (
            status.st_ctime_ns == self.ctime
            and status.st_mtime_ns == self.mtime
            and status.st_size == self.size
            and status.st_ino == self.ino
            and status.st_dev == self.dev
            and status.st_mode == self.mode
            and status.st_uid == self.uid
            and status.st_gid == self.gid
        )


class Block(NamedTuple):
    """Some entries of one directory, which `path` names relative to the source ("" for its top)."""

    path: str
    entries: list[Entry]


def entry_of(name: str, note: str, kind: int, status: os.stat_result) -> Entry:
    """The entry for what `status` tells."""
    return Entry(
        name,
        note,
        kind,
        status.st_mode,
        status.st_uid,
        status.st_gid,
        status.st_dev,
        status.st_ino,
        status.st_nlink,
        status.st_size,
        status.st_blocks * 512,
        status.st_atime_ns,
        status.st_mtime_ns,
        status.st_ctime_ns,
    )


def join(directory: str, name: str) -> str:
    """The path of `name`, which may be a relative path, in `directory`; either may be "", for its top."""
    return f"{directory}/{name}" if directory and name else directory or name


#: S_IFMT of stat(2).
_TYPE_BITS = 0o170000
#: The file types that are cloned.
_KINDS = {stat.S_IFREG: Kind.FILE, stat.S_IFLNK: Kind.SYMLINK, stat.S_IFDIR: Kind.DIRECTORY}
_FILE_TYPES = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
    stat.S_IFSOCK: "socket",
    stat.S_IFIFO: "fifo",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
}


def file_type(mode: int) -> str:
    """The word for the file type in `mode`: file, directory, symlink, socket …"""
    return _FILE_TYPES.get(stat.S_IFMT(mode), "unknown")


@dataclass
class Walk:
    """One walk of the directory `source_fd`, whose absolute path `source` serves messages only."""

    source_fd: int
    source: str
    selection: Selection
    hardlinks: bool
    #: Called now and then; raises to end the walk.
    checkpoint: Callable[[], None]
    #: First path of each file that has further names, until all of them were met.
    _first_names: dict[tuple[int, int], tuple[str, int]] = field(default_factory=dict)

    def blocks(self) -> Iterator[Block]:
        """Yield all entries below the source, a directory before what it holds.

        Raises ForkError: unsupported_file_type, permission_denied, source_changed, io_error.
        """
        pending = [""]
        while pending:
            path = pending.pop()
            below: list[str] = []
            for block in self.read(path):
                below += [join(path, entry.name) for entry in block.entries if entry.kind == Kind.DIRECTORY]
                yield block
            pending += reversed(below)

    def refuse_unsupported(self) -> None:
        """Raise what `blocks` would raise for a FIFO or a device, in a tenth of its time: no status is read."""
        pending = [""]
        while pending:
            path = pending.pop()
            with self._listing(path) as listing:
                for item in listing:
                    if item.is_dir(follow_symlinks=False):
                        if self.selection.reason(path, item.name, True) is None:
                            pending.append(join(path, item.name))
                    elif not item.is_file(follow_symlinks=False):
                        self._entry(path, item)

    def read(self, path: str) -> Iterator[Block]:
        """Yield the entries of the one directory `path`, in blocks. Raises as `blocks` does."""
        block = Block(path, [])
        with self._listing(path) as listing:
            for item in listing:
                block.entries.append(self._entry(path, item))
                if len(block.entries) == BLOCK_ENTRIES:
                    yield block
                    self.checkpoint()
                    block = Block(path, [])
        if block.entries:
            yield block

    @contextmanager
    def _listing(self, path: str) -> Iterator[Iterator[os.DirEntry[str]]]:
        self.checkpoint()
        try:
            fd = trees.open_below(self.source_fd, path)
        except OSError as error:
            raise from_source(error, "opening a directory of the source", self._absolute(path)) from None
        try:
            with os.scandir(fd) as listing:
                yield listing
        except OSError as error:
            raise from_oserror(error, "listing a directory of the source", self._absolute(path)) from None
        finally:
            os.close(fd)

    def _entry(self, directory: str, item: os.DirEntry[str]) -> Entry:
        name = item.name
        try:
            status = item.stat(follow_symlinks=False)
        except OSError as error:
            path = self._absolute(join(directory, name))
            raise from_source(error, "reading the status of an entry of the source", path) from None
        kind_bits = status.st_mode & _TYPE_BITS
        reason = self.selection.reason(directory, name, kind_bits == stat.S_IFDIR)
        if reason is not None:
            return entry_of(name, reason, Kind.SKIP, status)
        kind = _KINDS.get(kind_bits)
        if kind is not None:
            if status.st_nlink > 1 and self.hardlinks and kind != Kind.DIRECTORY:
                return self._linked(join(directory, name), name, kind, status)
            return entry_of(name, "", kind, status)
        if kind_bits == stat.S_IFSOCK:
            return entry_of(name, "socket", Kind.SKIP, status)
        message = f"a {file_type(status.st_mode)} cannot be forked; leave it out with skip or exclude"
        raise ForkError(Code.UNSUPPORTED_FILE_TYPE, message, self._absolute(join(directory, name)))

    def _linked(self, path: str, name: str, kind: Kind, status: os.stat_result) -> Entry:
        """The entry for a file with several names: the first met is the file, the others link to it."""
        key = (status.st_dev, status.st_ino)
        first, unmet = self._first_names.pop(key, ("", status.st_nlink))
        if unmet > 1:
            self._first_names[key] = (first or path, unmet - 1)
        return entry_of(name, first, Kind.HARDLINK if first else kind, status)

    def _absolute(self, path: str) -> str:
        return join(self.source, path)
