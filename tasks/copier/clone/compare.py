"""Comparing a directory with its clone, entry by entry, and counting the bytes that they share on disk.

Both sides are only read: without changing an atime where the kernel permits that, without
following a symlink, and without opening anything but directories and regular files. What cannot be read is never
called equal: it is listed with the reason.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from tasks.copier.clone.attributes import XFS_ACLS
from tasks.copier.clone.hardlinks import LinkNames
from tasks.copier.errors import errno_name
from tasks.copier.kernel import contents, extents, syscalls, trees
from tasks.copier.source.selection import Selection
from tasks.copier.source.walk import file_type, join

_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
#: Findings of one kind that are kept; the others are only counted. Bounds the memory for two unlike trees.
MOST_FINDINGS = 10_000
#: Data is compared in units of at least so many bytes: no filesystem here has larger blocks, unless st_blksize says so.
_LARGEST_BLOCK = 64 << 10
#: What a filesystem without extended attributes answers.
_NO_ATTRIBUTES = frozenset({errno.EOPNOTSUPP, errno.ENOSYS})
_ACLS = {"system.posix_acl_access": "ACL", "system.posix_acl_default": "default ACL"}


class Finding(NamedTuple):
    """What was found at one path, relative to both directories ("." for the directories themselves)."""

    path: str
    what: str


@dataclass
class Findings:
    """The first `MOST_FINDINGS` findings, and how many there were."""

    first: list[Finding] = field(default_factory=list)
    count: int = 0

    def add(self, path: str, what: str) -> None:
        """Note one more."""
        self.count += 1
        if len(self.first) < MOST_FINDINGS:
            self.first.append(Finding(path or ".", what))


@dataclass
class Comparison:
    """What `compare` found. Bytes are of the clone's regular files."""

    #: Entries compared; neither the two directories themselves nor the left-out entries of the source are counted.
    entries: int = 0
    differences: Findings = field(default_factory=Findings)
    #: What could not be read, and so was not compared.
    unread: Findings = field(default_factory=Findings)
    bytes_logical: int = 0
    #: On disk; and the part of them that lies in the source's blocks.
    bytes_mapped: int = 0
    bytes_shared: int = 0
    #: Files whose blocks the filesystem does not report (no FIEMAP: tmpfs, NFS).
    unmapped_files: int = 0

    @property
    def same(self) -> bool:
        """Whether everything was compared and nothing differs."""
        return not self.differences.count and not self.unread.count


def compare(source_fd: int, clone_fd: int, selection: Selection) -> Comparison:
    """Compare two open directories; `selection` is what the clone was made without.

    Compared are names, types, contents, sizes, holes, modes, owners, mtimes, extended attributes with ACLs, symlink
    targets, hard links, and whether something is mounted in the clone; of the directories themselves too. Not
    compared are atimes, which reading changes, and what Linux keeps from this user (`trusted.*` attributes).
    """
    with _view(source_fd) as source_view, _view(clone_fd) as clone_view:
        comparer = _Comparer(source_fd, source_view, clone_fd, clone_view, selection)
        comparer.run()
        return comparer.found


@contextmanager
def _view(fd: int) -> Iterator[int]:
    """The open directory on a mount that updates no atime, where this process may make one: symlinks are read there."""
    try:
        view = syscalls.readonly_view(fd)
    except OSError:
        yield fd
        return
    try:
        yield view
    finally:
        os.close(view)


class _Unread(Exception):
    """Something could not be read; its text says what and why."""


@contextmanager
def _reading(side: str, what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        name = errno_name(error.errno or 0)
        raise _Unread(f"could not be compared: {side}: {what}: {error.strerror} ({name})") from None


class _Comparer:
    """One comparison. Memory grows with the largest directory, and with the hard links whose names are not all met."""

    def __init__(self, source_fd: int, source_view: int, clone_fd: int, clone_view: int, selection: Selection) -> None:
        self.found = Comparison()
        self._source_fd = source_fd
        self._source_view = source_view
        self._clone_fd = clone_fd
        self._clone_view = clone_view
        self._clone_dev = os.fstat(clone_fd).st_dev
        self._selection = selection
        self._names = LinkNames()

    def run(self) -> None:
        """Compare the two directories and all below them."""
        with self._at(""):
            self._tops()
        pending = [""]
        while pending:
            path = pending.pop()
            with self._at(path):
                pending += self._directory(path)
        for path, links, met in self._names.unmet_of_clone():
            what = f"a hard link out of the clone: the file has {links} names, {met} of them met in the clone"
            # Where a directory could not be read, the missing name may lie in it.
            (self.found.unread if self.found.unread.count else self.found.differences).add(path, what)

    @contextmanager
    def _at(self, path: str) -> Iterator[None]:
        try:
            yield
        except _Unread as error:
            self.found.unread.add(path, str(error))

    def _differ(self, path: str, what: str) -> None:
        self.found.differences.add(path, what)

    def _tops(self) -> None:
        ours, theirs = os.fstat(self._source_fd), os.fstat(self._clone_fd)
        if os.path.samestat(ours, theirs):
            self._differ("", "the clone is the source itself")
        for what in _unlike_statuses(ours, theirs):
            self._differ("", what)
        if trees.is_subvolume(self._clone_fd) and not trees.is_subvolume(self._source_fd):
            self._differ("", "a btrfs subvolume in the clone only")

    def _directory(self, path: str) -> list[str]:
        """Compare one directory's attributes and entries; returns the paths of the directories to compare next."""
        with ExitStack() as opened:
            left_fd, left = _list(self._source_fd, path, "the source", opened)
            right_fd, right = _list(self._clone_fd, path, "the clone", opened)
            with self._at(path):
                self._attributes(path, left_fd, right_fd)
            below: list[str] = []
            for name in sorted(left | right):
                with self._at(join(path, name)):
                    ours = _status(left_fd, name, "the source") if name in left else None
                    theirs = _status(right_fd, name, "the clone") if name in right else None
                    if self._entry(path, name, left_fd, ours, right_fd, theirs):
                        below.append(join(path, name))
        return below[::-1]

    def _entry(
        self,
        directory: str,
        name: str,
        left_fd: int,
        ours: os.stat_result | None,
        right_fd: int,
        theirs: os.stat_result | None,
    ) -> bool:
        """Compare one entry; returns whether it is a directory on both sides."""
        path = join(directory, name)
        reason = None if ours is None else self._reason_to_leave_out(directory, name, ours)
        if theirs is None:
            if reason is None:
                self._differ(path, "only in the source")
            return False
        if ours is None or reason is not None:
            left_out = f", the source's is left out of a fork ({reason})" if reason else ""
            self._differ(path, f"only in the clone: a {file_type(theirs.st_mode)}{left_out}")
            if not stat.S_ISDIR(theirs.st_mode):
                self._names.meet_extra(path, theirs)
            return False
        self.found.entries += 1
        for what in _unlike_statuses(ours, theirs):
            self._differ(path, what)
        self._place_in_clone(path, name, right_fd, theirs)
        has_directory = stat.S_ISDIR(ours.st_mode) or stat.S_ISDIR(theirs.st_mode)
        if not has_directory and not self._names.agree(path, ours, theirs):
            self._differ(path, "the names of one file in the source are not the names of one file in the clone")
        if stat.S_IFMT(ours.st_mode) != stat.S_IFMT(theirs.st_mode):
            return False
        if stat.S_ISREG(ours.st_mode):
            self._files(path, name, left_fd, ours, right_fd, theirs)
        elif stat.S_ISLNK(ours.st_mode):
            self._symlinks(path, name, left_fd, right_fd)
        return stat.S_ISDIR(ours.st_mode)

    def _reason_to_leave_out(self, directory: str, name: str, ours: os.stat_result) -> str | None:
        if stat.S_ISSOCK(ours.st_mode):
            return "socket"
        return self._selection.reason(directory, name, stat.S_ISDIR(ours.st_mode))

    def _place_in_clone(self, path: str, name: str, right_fd: int, theirs: os.stat_result) -> None:
        """Report an entry of the clone that lies on another filesystem or subvolume: a fork makes neither."""
        with _reading("the clone", "reading its attributes"):
            mounted = syscalls.attributes(right_fd, name) & syscalls.STATX_ATTR_MOUNT_ROOT
        if mounted:
            self._differ(path, "something is mounted there in the clone")
        elif stat.S_ISDIR(theirs.st_mode) and theirs.st_dev != self._clone_dev:
            # Only of directories: on overlayfs a file may have the device number of a lower layer.
            self._differ(path, "a subvolume or filesystem of its own in the clone")

    def _files(
        self, path: str, name: str, left_dir: int, ours: os.stat_result, right_dir: int, theirs: os.stat_result
    ) -> None:
        with ExitStack() as opened:
            left_fd = _open(left_dir, name, ours, "the source", opened)
            right_fd = _open(right_dir, name, theirs, "the clone", opened)
            with self._at(path):
                self._attributes(path, left_fd, right_fd)
            if ours.st_size == theirs.st_size:
                with _reading("the contents", "reading"):
                    what = _unlike_contents(left_fd, ours, right_fd, theirs)
                if what is not None:
                    self._differ(path, what)
            self.found.bytes_logical += theirs.st_size
            self._count_blocks(left_fd, right_fd)
            _require_unchanged(left_fd, ours, "the source")
            _require_unchanged(right_fd, theirs, "the clone")

    def _symlinks(self, path: str, name: str, left_dir: int, right_dir: int) -> None:
        ours = _target(self._source_view, path, "the source")
        theirs = _target(self._clone_view, path, "the clone")
        if ours != theirs:
            self._differ(path, "another symlink target in the clone")
        # No *at call reaches a symlink's attributes; the magic link of its directory is race-free.
        self._attributes(path, f"/proc/self/fd/{left_dir}/{name}", f"/proc/self/fd/{right_dir}/{name}")

    def _attributes(self, path: str, left: int | str, right: int | str) -> None:
        ours, theirs = _attributes_of(left, "the source"), _attributes_of(right, "the clone")
        for name in sorted(ours.keys() | theirs.keys()):
            if ours.get(name) != theirs.get(name):
                where = "only in the source" * (name not in theirs) or "only in the clone" * (name not in ours)
                self._differ(path, f"{_ACLS.get(name, f'extended attribute {name}')}: {where or 'differs'}")

    def _count_blocks(self, left_fd: int, right_fd: int) -> None:
        try:
            blocks = extents.measure(left_fd, right_fd)
        except OSError:  # a number for the reader only: it says nothing about the contents
            blocks = None
        if blocks is None:
            self.found.unmapped_files += 1
        else:
            self.found.bytes_mapped += blocks.mapped
            self.found.bytes_shared += blocks.shared


def _list(top_fd: int, path: str, side: str, opened: ExitStack) -> tuple[int, set[str]]:
    """Open the directory `path` of one side, and list its names."""
    with _reading(side, "opening the directory"):
        fd = trees.open_below(top_fd, path)
    opened.callback(os.close, fd)
    with _reading(side, "listing the directory"):
        return fd, set(os.listdir(fd))


def _status(dir_fd: int, name: str, side: str) -> os.stat_result:
    with _reading(side, "reading its status"):
        return os.stat(name, dir_fd=dir_fd, follow_symlinks=False)


def _open(dir_fd: int, name: str, status: os.stat_result, side: str, opened: ExitStack) -> int:
    with _reading(side, "opening it"):
        try:
            fd = os.open(name, _READ | os.O_NOATIME, dir_fd=dir_fd)
        except PermissionError:  # open(2): O_NOATIME is for the owner and the privileged
            fd = os.open(name, _READ, dir_fd=dir_fd)
    opened.callback(os.close, fd)
    _require_unchanged(fd, status, side)
    return fd


def _target(view: int, path: str, side: str) -> str:
    directory, _, name = path.rpartition("/")
    with _reading(side, "reading the symlink"), ExitStack() as opened:
        fd = trees.open_below(view, directory)
        opened.callback(os.close, fd)
        return os.readlink(name, dir_fd=fd)


def _require_unchanged(fd: int, before: os.stat_result, side: str) -> None:
    now = os.fstat(fd)
    if not os.path.samestat(now, before) or now.st_size != before.st_size or now.st_ctime_ns != before.st_ctime_ns:
        raise _Unread(f"could not be compared: {side}: it was changed while it was compared")


def _unlike_statuses(ours: os.stat_result, theirs: os.stat_result) -> Iterator[str]:
    if stat.S_IFMT(ours.st_mode) != stat.S_IFMT(theirs.st_mode):
        yield f"a {file_type(ours.st_mode)} in the source, a {file_type(theirs.st_mode)} in the clone"
        return
    if stat.S_IMODE(ours.st_mode) != stat.S_IMODE(theirs.st_mode):
        yield f"mode {stat.S_IMODE(ours.st_mode):04o}, in the clone {stat.S_IMODE(theirs.st_mode):04o}"
    if (ours.st_uid, ours.st_gid) != (theirs.st_uid, theirs.st_gid):
        yield f"owner {ours.st_uid}:{ours.st_gid}, in the clone {theirs.st_uid}:{theirs.st_gid}"
    if ours.st_mtime_ns != theirs.st_mtime_ns:
        yield f"modified at {_seconds(ours.st_mtime_ns)}, in the clone at {_seconds(theirs.st_mtime_ns)}"
    if stat.S_ISREG(ours.st_mode) and ours.st_size != theirs.st_size:
        yield f"{ours.st_size} bytes, in the clone {theirs.st_size}"
    if (stat.S_ISCHR(ours.st_mode) or stat.S_ISBLK(ours.st_mode)) and ours.st_rdev != theirs.st_rdev:
        yield "another device number in the clone"


def _seconds(nanoseconds: int) -> str:
    """Seconds since the epoch with all digits, which a float does not have."""
    sign = "-" if nanoseconds < 0 else ""
    return f"{sign}{abs(nanoseconds) // 10**9}.{abs(nanoseconds) % 10**9:09}"


def _unlike_contents(left_fd: int, ours: os.stat_result, right_fd: int, theirs: os.stat_result) -> str | None:
    """What differs between the contents of two files of one size. Raises OSError."""
    at = contents.first_difference(left_fd, right_fd, 0, ours.st_size)
    if at is not None:
        return f"other contents, first at byte {at}"
    if theirs.st_blocks <= ours.st_blocks:
        return None
    block = max(_LARGEST_BLOCK, ours.st_blksize, theirs.st_blksize)
    most = contents.data_bytes(left_fd, ours.st_size, block)
    data = min(contents.data_bytes(right_fd, theirs.st_size), theirs.st_blocks * 512)
    return f"holes are filled: {most} bytes of data at most, in the clone {data}" if data > most else None


def _attributes_of(entry: int | str, side: str) -> dict[str, bytes]:
    follow = isinstance(entry, int)
    found: dict[str, bytes] = {}
    with _reading(side, "reading its extended attributes"):
        try:
            names = os.listxattr(entry, follow_symlinks=follow)
        except OSError as error:
            if error.errno in _NO_ATTRIBUTES:
                return {}  # the filesystem has no attributes
            raise
        for name in names:
            if name not in XFS_ACLS:
                found[name] = os.getxattr(entry, name, follow_symlinks=follow)
    return found
