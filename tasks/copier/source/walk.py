"""Reads the source once: each entry with its identity, directory by directory, in blocks."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

from tasks.copier.errors import Code, ForkError, from_oserror, from_source
from tasks.copier.kernel import trees
from tasks.copier.kernel.mounts import mount_points_below
from tasks.copier.source.selection import Selection

#: The most entries in a block. It limits the memory for a directory of a million files.
BLOCK_ENTRIES = 2_000


class Kind(IntEnum):
    """How an entry of the source is cloned."""

    FILE = 0
    SYMLINK = 1
    DIRECTORY = 2
    #: Another name of a file that the walk found before. `note` is the path of the first name.
    HARDLINK = 3
    #: Left out. `note` says why.
    SKIP = 4


class Entry(NamedTuple):
    """One entry of the source. A change of the entry changes its identity: dev, ino, size, mtime and ctime."""

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
    data: int  # allocated bytes (st_blocks); the rest is holes
    atime: int  # nanoseconds, as are the next two
    mtime: int
    ctime: int

    def is_still(self, status: os.stat_result) -> bool:
        """Whether `status`, which was read later, is of the same, unchanged entry.

        A change of owner or mode changes ctime too. They are still compared, because this entry may come from a forged
        manifest, and the clone must get the owner and mode of the source.
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
    """Entries of the directory `path` (relative to the source; "" is its top)."""

    path: str
    entries: list[Entry]


def entry_of(name: str, note: str, kind: int, status: os.stat_result) -> Entry:
    """An entry with the given status."""
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
    """Join two relative paths; either may be ""."""
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
    """The name of the file type in `mode`: file, directory, symlink, socket …"""
    return _FILE_TYPES.get(stat.S_IFMT(mode), "unknown")


@dataclass
class Walk:
    """One walk of the directory `source_fd`. Its absolute path `source` is for messages only."""

    source_fd: int
    source: str
    selection: Selection
    hardlinks: bool
    #: Called regularly. Raises to end the walk.
    checkpoint: Callable[[], None]
    #: The destination, for messages, and (dev, ino) of its parent. A bind mount may show that inside the source.
    destination: str = ""
    parent: tuple[int, int] | None = None
    #: (dev, ino) of a file with several names → (path of the first, number of names not found yet).
    _first_names: dict[tuple[int, int], tuple[str, int]] = field(default_factory=dict)
    #: Whether a mount in the source may show a file under more names than it has. Found out at the first such file.
    _holds_mounts: bool | None = None

    def blocks(self) -> Iterator[Block]:
        """Yield all entries below the source, each directory before its content.

        Raises ForkError: unsupported_file_type, destination_inside_source, permission_denied, source_changed, io_error.
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
        """Raise the error of `blocks` for a FIFO or a device, in a tenth of its time: it reads no status."""
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
        """Yield the entries of the directory `path` alone, in blocks. Raises the same errors as `blocks`."""
        block = Block(path, [])
        with self._listing(path) as listing:
            for item in listing:
                entry = self._entry(path, item)
                if entry is None:
                    continue
                block.entries.append(entry)
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

    def _entry(self, directory: str, item: os.DirEntry[str]) -> Entry | None:
        """The entry of one name. None if it was removed after it was listed, and is left out."""
        name = item.name
        try:
            status = item.stat(follow_symlinks=False)
        except OSError as error:
            return self._without_status(directory, item, error)
        kind_bits = status.st_mode & _TYPE_BITS
        if kind_bits == stat.S_IFDIR and (status.st_dev, status.st_ino) == self.parent:
            message = "the destination is inside the source, through a mount; choose one outside it"
            raise ForkError(Code.DESTINATION_INSIDE_SOURCE, message, self.destination)
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
        message = f"a {file_type(status.st_mode)} cannot be cloned; leave it out with skip or exclude"
        raise ForkError(Code.UNSUPPORTED_FILE_TYPE, message, self._absolute(join(directory, name)))

    def _without_status(self, directory: str, item: os.DirEntry[str], error: OSError) -> Entry | None:
        """The entry of a name whose status cannot be read, if it is left out. Raises ForkError if it is not.

        Temporary files and sockets of a running guest are removed at any moment. A mount in a directory that is left
        out may be of a user or a server that root cannot reach (FUSE: EACCES, ENOTCONN; NFS: ESTALE).
        """
        is_gone = isinstance(error, FileNotFoundError)
        kind_bits = 0  # a socket, a FIFO or a device
        with suppress(OSError):  # some filesystems do not list the types, and the status is read again
            if item.is_dir(follow_symlinks=False):
                kind_bits = stat.S_IFDIR
            elif item.is_file(follow_symlinks=False):
                kind_bits = stat.S_IFREG
            elif item.is_symlink():
                kind_bits = stat.S_IFLNK
        reason = self.selection.reason(directory, item.name, kind_bits == stat.S_IFDIR)
        if is_gone and (reason is not None or not kind_bits):
            return None
        if reason is not None:
            return Entry(item.name, reason, Kind.SKIP, kind_bits, *[0] * 10)
        path = self._absolute(join(directory, item.name))
        raise from_source(error, "reading the status of an entry of the source", path) from None

    def _linked(self, path: str, name: str, kind: Kind, status: os.stat_result) -> Entry:
        """The entry for a file with several names. The first one found is the file; the others are hard links."""
        key = (status.st_dev, status.st_ino)
        if self._holds_mounts is None:
            self._holds_mounts = bool(mount_points_below(self.source))
        first, not_found = self._first_names.pop(key, ("", status.st_nlink))
        if not_found > 1 or self._holds_mounts:
            self._first_names[key] = (first or path, not_found - 1)
        return entry_of(name, first, Kind.HARDLINK if first else kind, status)

    def _absolute(self, path: str) -> str:
        return join(self.source, path)
