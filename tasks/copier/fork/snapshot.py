"""A whole btrfs subvolume cloned in one step: the first rung of the ladder, above the reflink of each file.

One call gives a tree that shares everything with the source and has all its metadata, in a few milliseconds whatever
its size, and as the source was at one moment. It is walked then, once: for the FileResults, to take out what the fork
is to be without, and to see that nothing in it is other than a clone entry by entry would have it. Where something is,
or where the kernel refuses, nothing of it is left, and the ladder goes on below.

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
#: What a reflink leaves behind and a snapshot carries over: a machine could not write to its disk. Who made them so
#: cannot be removed either.
_LOCKED = syscalls.STATX_ATTR_IMMUTABLE | syscalls.STATX_ATTR_APPEND | syscalls.STATX_ATTR_VERITY
_METHODS: dict[int, Method] = {
    Kind.FILE: "snapshot",
    Kind.SYMLINK: "symlink",
    Kind.HARDLINK: "hardlink",
    Kind.DIRECTORY: "mkdir",
    Kind.SKIP: "skip",
}


class Unlike(Exception):
    """A snapshot would not be what cloning entry by entry gives, or could not be removed; the message says why."""


class Snapshot(NamedTuple):
    """A finished snapshot in the tree's place: its descriptor, which the caller closes, and what was done."""

    fd: int
    report: Report


def snapshot_tree(
    work: Workspace, staging: Staging, tree: str, ticker: Ticker, name: str = SNAPSHOT
) -> Snapshot | None:
    """Make the fork's tree a finished snapshot of the source: what was done, or None with nothing changed.

    None where the source is no subvolume, where it may not be snapshotted, or where the outcome would be another than
    that of a clone entry by entry. `tree` is the tree's name, `work.tree_fd` the empty one, which is gone then; `name`
    is the snapshot's while it is made. Raises ForkError, and OSError; then nothing of the snapshot is left.

    Nothing is written to the snapshot without need: at the first write btrfs copies a block that it shares, and counts
    a reference to each extent that the block names, 3 to 4 ms for an image in pieces.
    """
    ends, before = work.ends, ticker.progress
    if not is_wanted(work.options) or not is_whole_subvolume(ends.source_fd):
        return None
    ticker.enter("copy", 0, 0)  # what is to be done shows on the way
    try:
        fd = take(ends.source_fd, ends.source, staging.fd, name)
        if fd is None:
            ticker.progress = before
            return None
        try:
            top = _top(fd)
            keeps_out = top.mode & stat.S_IRWXU != stat.S_IRWXU
            if keeps_out:
                os.fchmod(fd, 0o700)  # or an ordinary user could not walk through it, and move it
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


# -- whether


def is_wanted(options: Options) -> bool:
    """Whether the caller's wishes allow a snapshot: it shares all data, and leaves no metadata out."""
    return options.snapshot == "auto" and options.reflink != "never" and options.preserve == PRESERVE_ALL


def is_whole_subvolume(fd: int) -> bool:
    """Whether the open directory is the root of a btrfs subvolume with nothing mounted in it.

    A snapshot shows what lies below a mount, where a walk shows what is mounted.
    """
    return trees.is_subvolume(fd) and not _holds_mounts(fd)


_OCTAL = re.compile(rb"\\([0-7]{3})")


def _holds_mounts(fd: int) -> bool:
    try:
        top = os.readlink(b"/proc/self/fd/%d" % fd).rstrip(b"/") + b"/"
        with open("/proc/self/mountinfo", "rb") as mounts:
            points = [line.split(b" ", 5)[4] for line in mounts]
    except OSError:  # without /proc nobody can know
        return True
    return any(_OCTAL.sub(lambda match: bytes([int(match[1], 8)]), point).startswith(top) for point in points)


# -- taking it


def take(source_fd: int, source: str, parent_fd: int, name: str) -> int | None:
    """Make `name` in `parent_fd` a snapshot of the subvolume `source_fd`, and open it; the caller closes it.

    Its mode is the source's at once, so `parent_fd` must keep others out. None where it is refused, and where it could
    not be removed again. Raises Unlike, ForkError for an errno that no copy must follow, and OSError.
    """
    if syscalls.filesystem_type(parent_fd) != syscalls.BTRFS:
        return None
    _Likeness().require(source_fd, ".", _top(source_fd))  # before: an immutable top keeps a subvolume from going
    try:
        if not _may_destroy(parent_fd, name) and not _can_be_emptied(source_fd, source):
            return None
        syscalls.create_snapshot(parent_fd, name, source_fd)
    except OSError as error:
        if meaning(error.errno or 0) is Answer.ERROR:
            raise from_oserror(error, "making a snapshot of it", source) from None
        return None
    return os.open(name, _DIRECTORY, dir_fd=parent_fd)


def _may_destroy(parent_fd: int, name: str) -> bool:
    """Whether this process may remove a subvolume of its own in one step, whatever is in it.

    Asked about an empty directory: who may is told that it is no subvolume.
    """
    os.mkdir(name, 0o700, dir_fd=parent_fd)
    try:
        syscalls.destroy_subvolume(parent_fd, name)
    except OSError as error:
        return error.errno == errno.EINVAL
    finally:
        os.rmdir(name, dir_fd=parent_fd)
    return False


def _can_be_emptied(source_fd: int, source: str) -> bool:
    """Whether this process could remove a snapshot entry by entry: all of it is its own, also what is to be left out.

    Without this look, a directory of another user in it would stay for ever.
    """
    walk = Walk(source_fd, source, Selection((), ()), hardlinks=False, checkpoint=lambda: None)
    likeness = _Likeness()
    try:
        for block in walk.blocks():
            fd = trees.open_below(source_fd, block.path)
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
    """Tells what a snapshot has otherwise than a clone entry by entry that this process would make."""

    def __init__(self) -> None:
        self._user = os.geteuid()
        self._groups = frozenset((os.getegid(), *os.getgroups()))

    def require(self, dir_fd: int, name: str, entry: Entry) -> None:
        """Raise Unlike for the entry `name` of `dir_fd` if it is such a thing, and OSError."""
        if entry.kind == Kind.DIRECTORY and entry.ino == trees.NESTED_SUBVOLUME_INODE:
            raise Unlike("a subvolume lies in it")
        if self._user != 0 and (entry.uid != self._user or entry.gid not in self._groups):
            raise Unlike("something in it would not keep its owner")
        if entry.kind != Kind.SYMLINK and syscalls.attributes(dir_fd, name) & _LOCKED:
            raise Unlike("something in it cannot be written to")


# -- completing it


def _restore_times(fd: int, directory: Entry) -> None:
    """Give a directory of the snapshot its times again, where they differ: see `snapshot_tree`."""
    now = os.fstat(fd)
    if (now.st_atime_ns, now.st_mtime_ns) != (directory.atime, directory.mtime):
        os.utime(fd, ns=(directory.atime, directory.mtime))


def complete(fd: int, top: Entry, ends: Endpoints, options: Options, ticker: Ticker) -> Report:
    """Walk the snapshot `fd`, and make it the fork: what was done. `top` is its root as it was made.

    What is left out is removed, and the times of the directories are as before; not those of the root, which is still
    to be moved. Raises Unlike, ForkError, OSError.
    """
    completion = _Completion(fd, ends, options, ticker)
    pending = [("", top)]
    while pending:
        path, entry = pending.pop()
        pending += reversed(completion.directory(path, entry))
    return completion.report


class _Completion:
    """One walk of a fresh snapshot."""

    def __init__(self, fd: int, ends: Endpoints, options: Options, ticker: Ticker) -> None:
        self.report = Report()
        self._fd, self._ends, self._ticker = fd, ends, ticker
        self._likeness = _Likeness()
        self._verify = options.verify == "content"
        self._walk = Walk(fd, ends.source, Selection(options.skip, options.exclude), True, ticker.poll)

    def directory(self, path: str, directory: Entry) -> list[tuple[str, Entry]]:
        """Take in one directory; returns those in it."""
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
        """Read a file back, and compare it with the source's. Raises ForkError: verify_failed, source_changed …"""
        source = join(self._ends.source, join(path, entry.name))
        with ExitStack() as opened:
            try:
                directory_fd = trees.open_below(self._ends.source_fd, path)
                opened.callback(os.close, directory_fd)
                src_fd = os.open(entry.name, _READ, dir_fd=directory_fd)
                opened.callback(os.close, src_fd)
                clone_fd = os.open(entry.name, _READ, dir_fd=fd)
                opened.callback(os.close, clone_fd)
                at = first_difference(src_fd, clone_fd, 0, entry.size)
            except PermissionError:
                raise Unlike("something in it cannot be read") from None
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
    except PermissionError:  # immutable, or an ordinary user's read-only directory
        raise Unlike("what is to be left out cannot be removed") from None


def _bytes_of(entry: Entry) -> int:
    return entry.size if entry.kind == Kind.FILE else 0


def _result(directory: str, entry: Entry) -> FileResult:
    reason = entry.note if entry.kind == Kind.SKIP else None
    path = join(directory, entry.name)
    return file_result(path, file_type(entry.mode), _METHODS[entry.kind], _bytes_of(entry), reason=reason)
