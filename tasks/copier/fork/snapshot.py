"""Cloning a whole btrfs subvolume by a snapshot, the method that is tried before reflinks.

A snapshot of any size takes a few milliseconds, shares all data and metadata with the source, and shows it at one
moment. It is then walked once: to make the FileResults, to remove the entries that the fork leaves out, and to check
that it equals a clone that is made entry by entry. If it differs, the snapshot is removed. Then, or if the kernel
refuses a snapshot, the source is cloned entry by entry.

Sources: ioctl(2) of btrfs in fs/btrfs/ioctl.c, btrfs-subvolume(8), and statx(2) for the attributes.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import stat
from contextlib import ExitStack
from typing import NamedTuple

from tasks.copier.endpoints import Endpoints
from tasks.copier.errors import Code, ForkError, from_oserror, from_source
from tasks.copier.kernel import syscalls, trees
from tasks.copier.kernel.contents import first_difference
from tasks.copier.kernel.leases import open_leased
from tasks.copier.kernel.mounts import maps_owners
from tasks.copier.kernel.processes import has_all_rights
from tasks.copier.kernel.reflink import Answer, meaning
from tasks.copier.options import PRESERVE_ALL, Options
from tasks.copier.progress import Ticker
from tasks.copier.report import FileResult, Method, Report, file_result
from tasks.copier.source.selection import Selection
from tasks.copier.source.walk import Entry, Kind, Walk, entry_of, file_type, join
from tasks.copier.staging.staging import SNAPSHOT, Staging
from tasks.copier.staging.workspace import Workspace, changed

log = logging.getLogger(__name__)

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOATIME
#: Attributes that a snapshot keeps and a reflink does not. A file that has one can be neither written nor removed.
_LOCKED = syscalls.STATX_ATTR_IMMUTABLE | syscalls.STATX_ATTR_APPEND | syscalls.STATX_ATTR_VERITY
_METHODS: dict[int, Method] = {
    Kind.FILE: "snapshot",
    Kind.SYMLINK: "symlink",
    Kind.HARDLINK: "hardlink",
    Kind.DIRECTORY: "mkdir",
    Kind.SKIP: "skip",
}


class Unlike(Exception):
    """A snapshot would differ from a clone entry by entry, or could not be removed; the message says why."""


class Snapshot(NamedTuple):
    """A finished snapshot that replaced the tree: its descriptor, which the caller closes, and its report."""

    fd: int
    report: Report


def snapshot_tree(
    work: Workspace, staging: Staging, tree: str, ticker: Ticker, name: str = SNAPSHOT
) -> Snapshot | None:
    """Replace the fork's empty tree by a finished snapshot of the source. Returns None if nothing was changed.

    That is the case if the source is not a subvolume, if a snapshot is not allowed, or if it would differ from a clone
    entry by entry. `tree` is the tree's name; the empty tree `work.tree_fd` is removed. `name` is the snapshot's name
    while it is made. Raises ForkError and OSError; then the snapshot is removed.

    The snapshot is written to only if necessary: with the first write to a shared block btrfs copies it and counts a
    reference to each of its extents, which takes 3 to 4 ms for a fragmented image.
    """
    ends, before = work.ends, ticker.progress
    if not is_wanted(work.options) or not is_whole_subvolume(ends.source_fd):
        return None
    ticker.enter("copy", 0, 0)  # the totals become known during the walk
    try:
        fd = take(ends, staging.fd, name)
        if fd is None:
            ticker.progress = before
            return None
        try:
            top = _top(fd)
            keeps_out = top.mode & stat.S_IRWXU != stat.S_IRWXU
            if keeps_out:
                os.fchmod(fd, 0o700)  # or an unprivileged worker could neither walk nor move it
            report = complete(fd, top, ends, work.options, ticker)
            ticker.enter("publish", report.totals.total, report.totals.bytes_logical)
            staging.exchange_tree(name, tree)
            if keeps_out:
                os.fchmod(fd, stat.S_IMODE(top.mode))
            _restore_times(fd, top)
        except BaseException:
            os.close(fd)
            raise
    except Unlike as unlike:
        log.debug("no snapshot of %r: %s", ends.source, unlike)
        trees.remove(staging.fd, name)
        ticker.progress = before
        return None
    except BaseException:
        trees.remove(staging.fd, name)
        raise
    return Snapshot(fd, report)


# -- whether a snapshot is allowed


def is_wanted(options: Options) -> bool:
    """Whether the options allow a snapshot, which shares all data and keeps all metadata.

    With `source_open: refuse` each file needs a lease, so the source is cloned file by file.
    """
    whole = options.reflink != "never" and options.preserve == PRESERVE_ALL
    return options.snapshot == "auto" and whole and options.source_open == "allow"


def is_whole_subvolume(fd: int) -> bool:
    """Whether the open directory is the root of a btrfs subvolume, with nothing mounted in it, and its stored owners.

    A snapshot contains the directory under a mount point, and a walk sees the mounted filesystem. A snapshot keeps the
    stored owners, and an idmapped mount shows others.
    """
    return trees.is_subvolume(fd) and not _holds_mounts(fd) and not maps_owners(fd)


_OCTAL = re.compile(rb"\\([0-7]{3})")


def _holds_mounts(fd: int) -> bool:
    try:
        top = os.readlink(b"/proc/self/fd/%d" % fd).rstrip(b"/") + b"/"
        with open("/proc/self/mountinfo", "rb") as mounts:
            points = [line.split(b" ", 5)[4] for line in mounts]
    except OSError:  # unknown without /proc
        return True
    return any(_OCTAL.sub(lambda match: bytes([int(match[1], 8)]), point).startswith(top) for point in points)


# -- making it


def take(ends: Endpoints, parent_fd: int, name: str) -> int | None:
    """Make `name` in `parent_fd` a snapshot of the source, a subvolume, and open it. The caller closes it.

    It has the source's mode at once, so `parent_fd` must not be open to other users. Returns None if the kernel refuses
    a snapshot, or if it could not be removed again. Raises Unlike, OSError, and ForkError for an errno after which
    nothing must be copied.
    """
    if syscalls.filesystem_type(parent_fd) != syscalls.BTRFS or maps_owners(parent_fd):
        return None
    top = _top(ends.source_fd)
    _Likeness().require(ends.source_fd, ".", top)  # before: a subvolume with an immutable root cannot be removed
    try:
        if not _may_destroy(parent_fd, name) and not _can_be_emptied(ends):
            return None
        syscalls.create_snapshot(parent_fd, name, ends.source_fd)
    except OSError as error:
        if meaning(error.errno or 0) is Answer.ERROR:
            raise from_oserror(error, f"making a snapshot of {ends.source}", ends.destination) from None
        return None
    return os.open(name, _DIRECTORY, dir_fd=parent_fd)


def _may_destroy(parent_fd: int, name: str) -> bool:
    """Whether this process may remove one of its subvolumes in one step, whatever it contains.

    This is tried with an empty directory: EINVAL means that it may, and that the directory is not a subvolume.
    """
    os.mkdir(name, 0o700, dir_fd=parent_fd)
    try:
        syscalls.destroy_subvolume(parent_fd, name)
    except OSError as error:
        return error.errno == errno.EINVAL
    finally:
        os.rmdir(name, dir_fd=parent_fd)
    return False


def _can_be_emptied(ends: Endpoints) -> bool:
    """Whether this process could remove a snapshot entry by entry, because it owns all entries, also those left out.

    Without this check, a directory of another user in the snapshot could never be removed.
    """
    walk = Walk(ends.source_fd, ends.source, Selection((), ()), hardlinks=False, checkpoint=lambda: None)
    likeness = _Likeness()
    try:
        for block in walk.blocks():
            fd = trees.open_below(ends.source_fd, block.path)
            try:
                for entry in block.entries:
                    likeness.require(fd, entry.name, entry)
            finally:
                os.close(fd)
    except (Unlike, ForkError, OSError):
        return False
    return True


def _top(fd: int) -> Entry:
    return entry_of("", "", Kind.DIRECTORY, os.fstat(fd))


class _Likeness:
    """Finds entries that would differ in a clone entry by entry made by this process."""

    def __init__(self) -> None:
        self._may_do_all = has_all_rights()
        self._user = os.geteuid()
        self._groups = frozenset((os.getegid(), *os.getgroups()))

    def require(self, dir_fd: int, name: str, entry: Entry) -> None:
        """Raise Unlike if the entry `name` of `dir_fd` would differ. Raises OSError."""
        if entry.kind == Kind.DIRECTORY and entry.ino == trees.NESTED_SUBVOLUME_INODE:
            raise Unlike("it contains another subvolume")
        if not self._may_do_all and (entry.uid != self._user or entry.gid not in self._groups):
            raise Unlike("this process could not give an entry its owner")
        if entry.kind != Kind.SYMLINK and syscalls.attributes(dir_fd, name) & _LOCKED:
            raise Unlike("an entry is immutable, append-only or has fs-verity")


# -- completing it


def _restore_times(fd: int, directory: Entry) -> None:
    """Restore the times of a directory of the snapshot if they differ: see `snapshot_tree`."""
    now = os.fstat(fd)
    if (now.st_atime_ns, now.st_mtime_ns) != (directory.atime, directory.mtime):
        os.utime(fd, ns=(directory.atime, directory.mtime))


def complete(fd: int, top: Entry, ends: Endpoints, options: Options, ticker: Ticker) -> Report:
    """Walk the snapshot `fd` and make it the fork. Returns the report. `top` is its root as it was made.

    Entries that are left out are removed, and the times of directories are restored, except those of the root, which
    is moved later. Raises Unlike, ForkError, OSError.
    """
    completion = _Completion(fd, ends, options, ticker)
    pending = [("", top)]
    while pending:
        path, entry = pending.pop()
        pending += reversed(completion.directory(path, entry))
    return completion.report


class _Completion:
    """The walk of a new snapshot that completes it."""

    def __init__(self, fd: int, ends: Endpoints, options: Options, ticker: Ticker) -> None:
        self.report = Report()
        self._fd, self._ends, self._ticker = fd, ends, ticker
        self._likeness = _Likeness()
        self._verify = options.verify == "content"
        self._walk = Walk(fd, ends.source, Selection(options.skip, options.exclude), True, ticker.poll)
        parent_dev, parent_ino = ends.parent_identity()
        if parent_dev == os.fstat(ends.source_fd).st_dev:  # inodes of a snapshot have the numbers of the source's
            self._walk.destination, self._walk.parent = ends.destination, (os.fstat(fd).st_dev, parent_ino)

    def directory(self, path: str, directory: Entry) -> list[tuple[str, Entry]]:
        """Complete one directory. Returns the directories in it."""
        below: list[tuple[str, Entry]] = []
        fd = trees.open_below(self._fd, path)
        try:
            for block in self._walk.read(path):
                self._ticker.expect(len(block.entries), sum(map(_bytes_of, block.entries)))
                for entry in block.entries:
                    self._entry(fd, path, entry)
                    if entry.kind == Kind.DIRECTORY:
                        below.append((join(path, entry.name), entry))
            _restore_times(fd, directory)
        finally:
            os.close(fd)
        return below

    def _entry(self, fd: int, path: str, entry: Entry) -> None:
        if entry.kind == Kind.SKIP:
            _remove(fd, entry)
        else:
            self._likeness.require(fd, entry.name, entry)
            if entry.kind == Kind.FILE and self._verify:
                self._compare(fd, path, entry)
        self.report.add(_result(path, entry))
        self._ticker(1, _bytes_of(entry))

    def _compare(self, fd: int, path: str, entry: Entry) -> None:
        """Compare a file with the source's. Raises Unlike, and ForkError: verify_failed, source_changed …"""
        source = join(self._ends.source, join(path, entry.name))
        with ExitStack() as opened:
            try:
                directory_fd = trees.open_below(self._ends.source_fd, path)
                opened.callback(os.close, directory_fd)
                src_fd = open_leased(entry.name, _READ, directory_fd)
                opened.callback(os.close, src_fd)
                clone_fd = os.open(entry.name, _READ, dir_fd=fd)
                opened.callback(os.close, clone_fd)
                at = first_difference(src_fd, clone_fd, 0, entry.size)
            except PermissionError:
                raise Unlike("a file cannot be read") from None
            except OSError as error:
                raise from_source(error, "reading it back", source) from None
            if at is None:
                return
            now = os.fstat(src_fd)
            if (now.st_ino, now.st_size, now.st_mtime_ns) != (entry.ino, entry.size, entry.mtime):
                raise changed(source)
            destination = join(self._ends.destination, join(path, entry.name))
            raise ForkError(Code.VERIFY_FAILED, f"it differs from the source at byte {at}", destination)


def _remove(fd: int, entry: Entry) -> None:
    try:
        if stat.S_ISDIR(entry.mode):
            trees.remove(fd, entry.name)
        else:
            os.unlink(entry.name, dir_fd=fd)
    except PermissionError:  # immutable, or in a read-only directory of an unprivileged worker
        raise Unlike("an entry that is left out cannot be removed") from None


def _bytes_of(entry: Entry) -> int:
    return entry.size if entry.kind == Kind.FILE else 0


def _result(directory: str, entry: Entry) -> FileResult:
    reason = entry.note if entry.kind == Kind.SKIP else None
    path = join(directory, entry.name)
    return file_result(path, file_type(entry.mode), _METHODS[entry.kind], _bytes_of(entry), reason=reason)
