"""Comparing a directory with its clone, entry by entry, and counting the bytes that they share on disk."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import NamedTuple

from tasks.copier.errors import from_oserror
from tasks.copier.kernel import sharing, trees
from tasks.copier.kernel.contents import first_difference
from tasks.copier.metadata import XFS_ACLS
from tasks.copier.selection import Selection
from tasks.copier.walk import Entry, Kind, Walk, file_type, join

_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_NOTHING_LEFT_OUT = Selection((), ())


class Difference(NamedTuple):
    """What differs at one path, relative to both directories."""

    path: str
    what: str


@dataclass
class Comparison:
    """What `compare` found. Bytes are of the clone's regular files."""

    #: Entries compared, the left-out ones of the source not among them.
    entries: int = 0
    differences: list[Difference] = field(default_factory=list)
    bytes_logical: int = 0
    #: On disk; and of these, the bytes whose blocks are those of the source.
    bytes_mapped: int = 0
    bytes_shared: int = 0
    #: Files of whose blocks the filesystem tells nothing (no FIEMAP: tmpfs, NFS).
    unmapped_files: int = 0


@dataclass
class _Side:
    """One of the two directories."""

    fd: int
    path: str
    selection: Selection

    def entries(self, directory: str) -> dict[str, Entry]:
        walk = Walk(self.fd, self.path, self.selection, hardlinks=False, checkpoint=_go_on)
        return {e.name: e for block in walk.read(directory) for e in block.entries if e.kind != Kind.SKIP}


@dataclass
class _Names:
    """Which inode of the clone stands for which of the source, to see that names of one file are so in both."""

    clone_of: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)
    source_of: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)

    def agree(self, ours: Entry, theirs: Entry) -> bool:
        if ours.nlink == 1 and theirs.nlink == 1:
            return True
        source, clone = (ours.dev, ours.ino), (theirs.dev, theirs.ino)
        return self.clone_of.setdefault(source, clone) == clone and self.source_of.setdefault(clone, source) == source


def compare(
    source_fd: int, source: str, clone_fd: int, clone: str, selection: Selection, tick: Callable[[int], None]
) -> Comparison:
    """Compare two open directories; `selection` is what the clone was made without.

    Names, types, contents, modes, owners, times, extended attributes, symlink targets and hard links. `tick` is
    called with the bytes of each file compared. Raises ForkError: permission_denied, source_changed, io_error.
    """
    found = Comparison()
    ours, theirs = _Side(source_fd, source, selection), _Side(clone_fd, clone, _NOTHING_LEFT_OUT)
    names = _Names()
    pending = [""]
    while pending:
        directory = pending.pop()
        left, right = ours.entries(directory), theirs.entries(directory)
        for name in sorted(left.keys() | right.keys()):
            path = join(directory, name)
            if name not in right:
                found.differences.append(Difference(path, "only in the source"))
            elif name not in left:
                found.differences.append(Difference(path, "only in the clone"))
            else:
                found.entries += 1
                found.differences += [Difference(path, what) for what in _metadata(left[name], right[name], names)]
                if left[name].kind == right[name].kind == Kind.DIRECTORY:
                    pending.append(path)
        _compare_open(ours, theirs, directory, left, right, found, tick)
    return found


def _metadata(ours: Entry, theirs: Entry, names: _Names) -> Iterator[str]:
    if stat.S_IFMT(ours.mode) != stat.S_IFMT(theirs.mode):
        yield f"a {file_type(ours.mode)} in the source, a {file_type(theirs.mode)} in the clone"
        return
    if stat.S_IMODE(ours.mode) != stat.S_IMODE(theirs.mode):
        yield f"mode {stat.S_IMODE(ours.mode):04o}, in the clone {stat.S_IMODE(theirs.mode):04o}"
    if (ours.uid, ours.gid) != (theirs.uid, theirs.gid):
        yield f"owner {ours.uid}:{ours.gid}, in the clone {theirs.uid}:{theirs.gid}"
    if ours.mtime != theirs.mtime:
        yield f"modified at {ours.mtime / 1e9:.9f}, in the clone at {theirs.mtime / 1e9:.9f}"
    if ours.kind == Kind.FILE and ours.size != theirs.size:
        yield f"{ours.size} bytes, in the clone {theirs.size}"
    if ours.kind != Kind.DIRECTORY and not names.agree(ours, theirs):
        yield "the names of one file in the source are not the names of one file in the clone"


def _compare_open(
    ours: _Side,
    theirs: _Side,
    directory: str,
    left: dict[str, Entry],
    right: dict[str, Entry],
    found: Comparison,
    tick: Callable[[int], None],
) -> None:
    """Compare what only shows with the entries open: contents, attributes, symlink targets, blocks."""
    with ExitStack() as opened:
        try:
            left_fd = trees.open_below(ours.fd, directory)
            opened.callback(os.close, left_fd)
            right_fd = trees.open_below(theirs.fd, directory)
            opened.callback(os.close, right_fd)
            found.differences += [Difference(directory or ".", what) for what in _xattrs(left_fd, right_fd)]
            for name in sorted(left.keys() & right.keys()):
                if left[name].kind != right[name].kind:
                    continue
                path = join(directory, name)
                if left[name].kind == Kind.SYMLINK:
                    targets = os.readlink(name, dir_fd=left_fd), os.readlink(name, dir_fd=right_fd)
                    if targets[0] != targets[1]:
                        found.differences.append(Difference(path, "another symlink target in the clone"))
                elif left[name].kind == Kind.FILE:
                    whats = _compare_files(left_fd, right_fd, left[name], right[name], found)
                    found.differences += [Difference(path, what) for what in whats]
                    tick(left[name].size)
        except OSError as error:
            raise from_oserror(error, "comparing", join(theirs.path, directory)) from None


def _compare_files(left_dir: int, right_dir: int, ours: Entry, theirs: Entry, found: Comparison) -> list[str]:
    whats = []
    left_fd = os.open(ours.name, _READ, dir_fd=left_dir)
    try:
        right_fd = os.open(theirs.name, _READ, dir_fd=right_dir)
        try:
            whats += _xattrs(left_fd, right_fd)
            if ours.size == theirs.size:
                at = first_difference(left_fd, right_fd, 0, ours.size)
                if at is not None:
                    whats.append(f"other contents, first at byte {at}")
            found.bytes_logical += theirs.size
            blocks = sharing.measure(left_fd, right_fd)
            if blocks is None:
                found.unmapped_files += 1
            else:
                found.bytes_mapped += blocks.mapped
                found.bytes_shared += blocks.shared
        finally:
            os.close(right_fd)
    finally:
        os.close(left_fd)
    return whats


def _xattrs(left_fd: int, right_fd: int) -> list[str]:
    ours, theirs = _attributes(left_fd), _attributes(right_fd)
    return [
        f"extended attribute {name} differs"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]


def _attributes(fd: int) -> dict[str, bytes]:
    try:
        return {name: os.getxattr(fd, name) for name in os.listxattr(fd) if name not in XFS_ACLS}
    except OSError:
        return {}  # a filesystem without any


def _go_on() -> None:
    """No look-up on the way."""
