"""Compares a directory with its clone, entry by entry, and counts the bytes that they share on disk.

Both sides are only read: without changing an atime where the kernel permits that, without following a symlink, and
without opening anything but directories and regular files. An entry that cannot be read never counts as equal. It is
listed with the reason.
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
from tasks.copier.kernel.leases import open_leased
from tasks.copier.source.selection import Selection
from tasks.copier.source.walk import file_type, join

_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
#: The most findings of one kind that are kept. Further ones are only counted, which limits the memory.
MOST_FINDINGS = 10_000
#: The assumed block size in bytes, unless st_blksize is larger. No common filesystem has larger blocks.
_LARGEST_BLOCK = 64 << 10
#: Errnos of a filesystem without extended attributes.
_NO_ATTRIBUTES = frozenset({errno.EOPNOTSUPP, errno.ENOSYS})
_ACLS = {"system.posix_acl_access": "ACL", "system.posix_acl_default": "default ACL"}


class Finding(NamedTuple):
    """A finding at one path, relative to both directories ("." for the directories themselves)."""

    path: str
    what: str


@dataclass
class Findings:
    """The first `MOST_FINDINGS` findings, and the number of all."""

    first: list[Finding] = field(default_factory=list)
    count: int = 0

    def add(self, path: str, what: str) -> None:
        """Add a finding."""
        self.count += 1
        if len(self.first) < MOST_FINDINGS:
            self.first.append(Finding(path or ".", what))


@dataclass
class Comparison:
    """The result of `compare`. Bytes are those of the clone's regular files, hard links once."""

    #: Compared entries, without the two directories themselves and without left-out entries of the source.
    entries: int = 0
    differences: Findings = field(default_factory=Findings)
    #: Entries that could not be read, and so were not compared.
    unread: Findings = field(default_factory=Findings)
    bytes_logical: int = 0
    #: Bytes on disk, and how many of them are in blocks of the source.
    bytes_mapped: int = 0
    bytes_shared: int = 0
    #: Files whose blocks the filesystem does not report (without FIEMAP, such as tmpfs and NFS).
    unmapped_files: int = 0

    @property
    def same(self) -> bool:
        """Whether everything was compared, without a difference."""
        return not self.differences.count and not self.unread.count


def compare(source_fd: int, clone_fd: int, selection: Selection) -> Comparison:
    """Compare two open directories. `selection` says what the clone was made without.

    Compares names, types, contents, sizes, holes, modes, owners, mtimes, extended attributes, ACLs, symlink targets and
    hard links, also of the directories themselves, and finds mounts in the clone. Does not compare atimes, which
    reading changes, and attributes that Linux hides from this user (`trusted.*`).
    """
    with _view(source_fd) as source_view, _view(clone_fd) as clone_view:
        comparer = _Comparer(source_fd, source_view, clone_fd, clone_view, selection)
        comparer.run()
        return comparer.found


@contextmanager
def _view(fd: int) -> Iterator[int]:
    """The directory on a mount without atime updates, if this process may make one. Symlinks are read there."""
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
    """An entry could not be read. The text says which part, and why."""


@contextmanager
def _reading(side: str, what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        name = errno_name(error.errno or 0)
        raise _Unread(f"not compared: {side}: {what}: {error.strerror} ({name})") from None


class _Comparer:
    """One comparison. Its memory grows with the largest directory and the number of hard links."""

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
        for path, links, found in self._names.incomplete_of_clone():
            what = f"a hard link out of the clone: the file has {links} names, {found} of them in the clone"
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
        """Compare one directory's attributes and entries. Returns the paths of its subdirectories."""
        with ExitStack() as opened:
            left_fd, left = _list(self._source_fd, path, "the source", opened)
            right_fd, right = _list(self._clone_fd, path, "the clone", opened)
            with self._at(path):
                self._attributes(path, left_fd, right_fd)
            below: list[str] = []
            for name in sorted(left | right):
                with self._at(join(path, name)):
                    ours = self._status_in_source(left_fd, path, name) if name in left else None
                    theirs = _status(right_fd, name, "the clone") if name in right else None
                    if ours is None and theirs is None:
                        continue  # it is left out
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
        """Compare one entry. Returns whether it is a directory on both sides."""
        path = join(directory, name)
        reason = None if ours is None else self._reason_to_leave_out(directory, name, ours)
        if theirs is None:
            if reason is None:
                self._differ(path, "only in the source")
            return False
        if ours is None or reason is not None:
            left_out = f"; in the source it is left out ({reason})" if reason else ""
            self._differ(path, f"only in the clone: a {file_type(theirs.st_mode)}{left_out}")
            if not stat.S_ISDIR(theirs.st_mode):
                self._names.add_extra(path, theirs)
            return False
        self.found.entries += 1
        for what in _unlike_statuses(ours, theirs):
            self._differ(path, what)
        self._place_in_clone(path, name, right_fd, theirs)
        compared_with = self._names.source_of_earlier_name(theirs)
        has_directory = stat.S_ISDIR(ours.st_mode) or stat.S_ISDIR(theirs.st_mode)
        if not has_directory and not self._names.add_pair(path, ours, theirs):
            self._differ(path, "not the same hard links in source and clone")
        if stat.S_IFMT(ours.st_mode) != stat.S_IFMT(theirs.st_mode):
            return False
        if stat.S_ISREG(ours.st_mode):
            if compared_with != (ours.st_dev, ours.st_ino):
                self._files(path, name, left_fd, ours, right_fd, theirs, counts=compared_with is None)
        elif stat.S_ISLNK(ours.st_mode):
            self._symlinks(path, name, left_fd, right_fd)
        return stat.S_ISDIR(ours.st_mode)

    def _status_in_source(self, left_fd: int, directory: str, name: str) -> os.stat_result | None:
        """The status of an entry of the source; None if it cannot be read, and the entry is left out."""
        try:
            return _status(left_fd, name, "the source")
        except _Unread:
            if self._selection.reason(directory, name, is_directory=True) is None:
                raise
            return None

    def _reason_to_leave_out(self, directory: str, name: str, ours: os.stat_result) -> str | None:
        if stat.S_ISSOCK(ours.st_mode):
            return "socket"
        return self._selection.reason(directory, name, stat.S_ISDIR(ours.st_mode))

    def _place_in_clone(self, path: str, name: str, right_fd: int, theirs: os.stat_result) -> None:
        """Report an entry of the clone on another filesystem or subvolume. A fork makes neither."""
        with _reading("the clone", "reading its attributes"):
            mounted = syscalls.attributes(right_fd, name) & syscalls.STATX_ATTR_MOUNT_ROOT
        if mounted:
            self._differ(path, "a mount point in the clone")
        elif stat.S_ISDIR(theirs.st_mode) and theirs.st_dev != self._clone_dev:
            # Only for directories: on overlayfs a file may have the device number of a lower layer.
            self._differ(path, "a separate subvolume or filesystem in the clone")

    def _files(
        self,
        path: str,
        name: str,
        left_dir: int,
        ours: os.stat_result,
        right_dir: int,
        theirs: os.stat_result,
        *,
        counts: bool,
    ) -> None:
        """Compare two files. `counts`: count the bytes of the clone, which an earlier hard link did not."""
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
            if counts:
                self.found.bytes_logical += theirs.st_size
                self._count_blocks(left_fd, right_fd)
            _require_unchanged(left_fd, ours, "the source")
            _require_unchanged(right_fd, theirs, "the clone")

    def _symlinks(self, path: str, name: str, left_dir: int, right_dir: int) -> None:
        ours = _target(self._source_view, path, "the source")
        theirs = _target(self._clone_view, path, "the clone")
        if ours != theirs:
            self._differ(path, "a different symlink target in the clone")
        # No *at call accesses the attributes of a symlink. The path through the open directory cannot be exchanged.
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
        except OSError:  # the number is informative only; it says nothing about the contents
            blocks = None
        if blocks is None:
            self.found.unmapped_files += 1
        else:
            self.found.bytes_mapped += blocks.mapped
            self.found.bytes_shared += blocks.shared


def _list(top_fd: int, path: str, side: str, opened: ExitStack) -> tuple[int, set[str]]:
    """Open the directory `path` of one side. Returns its descriptor and its names."""
    with _reading(side, "opening the directory"):
        fd = trees.open_below(top_fd, path)
    opened.callback(os.close, fd)
    with _reading(side, "listing the directory"):
        return fd, set(os.listdir(fd))


def _status(dir_fd: int, name: str, side: str) -> os.stat_result:
    with _reading(side, "reading its status"):
        return os.stat(name, dir_fd=dir_fd, follow_symlinks=False)


def _open(dir_fd: int, name: str, status: os.stat_result, side: str, opened: ExitStack) -> int:
    with _reading(side, "opening the file"):
        try:
            fd = open_leased(name, _READ | os.O_NOATIME, dir_fd)
        except PermissionError:  # open(2): O_NOATIME needs ownership or privilege
            fd = open_leased(name, _READ, dir_fd)
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
        raise _Unread(f"not compared: {side}: it was changed during the comparison")


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
        yield "a different device number in the clone"


def _seconds(nanoseconds: int) -> str:
    """Nanoseconds as seconds, with all digits (a float would lose some)."""
    sign = "-" if nanoseconds < 0 else ""
    return f"{sign}{abs(nanoseconds) // 10**9}.{abs(nanoseconds) % 10**9:09}"


def _unlike_contents(left_fd: int, ours: os.stat_result, right_fd: int, theirs: os.stat_result) -> str | None:
    """The difference between the contents of two files of the same size, or None. Raises OSError, _Unread."""
    at = contents.first_difference(left_fd, right_fd, 0, ours.st_size)
    if at is not None:
        return f"different contents from byte {at}"
    for side, fd in (("the source", left_fd), ("the clone", right_fd)):
        if os.pread(fd, 1, ours.st_size):
            raise _Unread(f"not compared: {side}: it has more data than the {ours.st_size} bytes that are its size")
    if theirs.st_blocks <= ours.st_blocks:
        return None
    block = max(_LARGEST_BLOCK, ours.st_blksize, theirs.st_blksize)
    most = contents.data_bytes(left_fd, ours.st_size, block)
    data = min(contents.data_bytes(right_fd, theirs.st_size), theirs.st_blocks * 512)
    return f"holes are filled: at most {most} bytes of data in the source, {data} in the clone" if data > most else None


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
