"""Cloning the entries of one directory: each file by the ladder FICLONE, copy_file_range, pread/pwrite."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from tasks.copier.clone.metadata import Metadata, doing
from tasks.copier.clone.name_collisions import name_taken
from tasks.copier.clone.reflinker import NOT_ASKED_FOR, Reflinker, Refusal
from tasks.copier.clone.sparse_copy import Part, SparseCopier, Step
from tasks.copier.errors import Code, ForkError, from_oserror, from_source
from tasks.copier.kernel.contents import first_difference
from tasks.copier.options import Options
from tasks.copier.report import Fallback, FileResult, Method, file_result
from tasks.copier.source.walk import Entry, Kind, join

T = TypeVar("T")

#: O_NONBLOCK: a file swapped for a FIFO must not hang us.
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = int(Kind.FILE)
#: Files up to so many bytes get their size by being written, which saves a call (5 us on ext4). XFS, by default, does
#: not preallocate behind a file so small.
_GROWN_BYTES = 64 << 10
_OPEN = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class DirectoryPair:
    """One directory of the source and its counterpart in the tree, both open."""

    src_fd: int
    dst_fd: int
    #: st_dev of the destination's filesystem.
    dst_dev: int
    #: Relative to the source.
    path: str
    #: The absolute paths of source and destination, for messages.
    source: str
    destination: str

    def source_of(self, name: str) -> str:
        """The absolute source path of the entry `name`."""
        return join(self.source, join(self.path, name))

    def destination_of(self, name: str) -> str:
        """The absolute path that the entry `name` is to have."""
        return join(self.destination, join(self.path, name))

    def paths_of(self, name: str) -> tuple[str, str]:
        """Both."""
        return self.source_of(name), self.destination_of(name)


class ReflinkRefused(Exception):
    """A file was to be reflinked or left: it was refused, and nothing of it is left. `refusal` says why."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal)
        self.refusal = refusal


class Cloner:
    """Clones entries of one fork; keeps what is learnt on the way: refused pairs, the first fallback, one buffer."""

    def __init__(
        self, options: Options, refused: dict[tuple[int, int], int], step: Step, *, replaces: bool = False
    ) -> None:
        """`step` is called with the bytes of each piece copied, and raises to stop.

        `replaces`: an earlier try of the same work may have left entries, which are replaced. Otherwise an entry that
        exists is an error.
        """
        self.reflinker = Reflinker(refused)
        self.metadata = Metadata(options.preserve)
        self.fallback: Fallback | None = None
        self._options = options
        self._replaces = replaces
        self._sparse = SparseCopier(step, offload=options.reflink != "never")
        self._user, self._group = os.geteuid(), os.getegid()
        self._no_atime = os.O_NOATIME

    # -- whole entries

    def entry(self, place: DirectoryPair, entry: Entry) -> FileResult:
        """Clone one file or symlink. Raises ForkError; then nothing of the entry is left."""
        if entry.kind != _FILE:
            return self._symlink(place, entry)
        return self.file(place, entry)

    def file(self, place: DirectoryPair, entry: Entry, *, may_copy: bool = True) -> FileResult:
        """Clone one regular file. Raises ForkError, and ReflinkRefused where it may not be copied instead."""
        src_fd = self.open_source(place, entry)
        try:
            return self.file_from(src_fd, place, entry, may_copy=may_copy)
        finally:
            os.close(src_fd)

    def file_from(
        self, src_fd: int, place: DirectoryPair, entry: Entry, *, may_copy: bool = True, check: bool = True
    ) -> FileResult:
        """As `file`, for a source that `open_source` opened.

        Who makes several clones of it may leave out the `check` that it is still what the walk saw, and calls
        `check_source` after the last one.
        """
        began = time.perf_counter()
        copied, refusal = 0, None
        dst_fd = self._create(place, entry, src_fd)
        try:
            refusal = self._reflink(place, entry, src_fd, dst_fd)
            if refusal is not None:
                if not may_copy:
                    raise ReflinkRefused(refusal)
                copied = self._copy(place, entry, src_fd, dst_fd, refusal)
            self._complete(place, entry, src_fd, dst_fd)
            if check:
                self.check_source(place, entry, src_fd)  # after its attributes were read: they change ctime too
        except ReflinkRefused:
            try:
                os.unlink(entry.name, dir_fd=place.dst_fd)
            except OSError as error:  # it is made again, as a copy, and would meet what is left of this one
                doing_so = "removing what a refused reflink left"
                raise from_oserror(error, doing_so, place.destination_of(entry.name)) from None
            raise
        except BaseException as error:
            with suppress(OSError):
                os.unlink(entry.name, dir_fd=place.dst_fd)
            if isinstance(error, ForkError) and error.code is not Code.CANCELLED:
                self.check_source(place, entry, src_fd)  # where it changed, that is the cause
            raise
        finally:
            os.close(dst_fd)
        method: Method = "reflink" if refusal is None else "copy"
        reason = None if refusal is None else refusal.reason
        seconds = time.perf_counter() - began
        return file_result(join(place.path, entry.name), "file", method, entry.size, copied, seconds, reason)

    def _symlink(self, place: DirectoryPair, entry: Entry) -> FileResult:
        began = time.perf_counter()
        source = place.source_of(entry.name)
        try:
            target = os.readlink(entry.name, dir_fd=place.src_fd)
        except OSError as error:
            if error.errno == errno.EINVAL:  # no symlink any more (readlink(2))
                raise ForkError(Code.SOURCE_CHANGED, "it was replaced while it was cloned", source) from None
            raise from_source(error, "reading a symlink", source) from None
        try:
            try:
                os.symlink(target, entry.name, dir_fd=place.dst_fd)
            except FileExistsError:
                self._make_again(place, entry, lambda: os.symlink(target, entry.name, dir_fd=place.dst_fd))
        except OSError as error:
            raise from_oserror(error, "making a symlink", place.destination_of(entry.name)) from None
        try:
            self._complete_symlink(place, entry)
        except BaseException:
            with suppress(OSError):
                os.unlink(entry.name, dir_fd=place.dst_fd)
            raise
        seconds = time.perf_counter() - began
        return file_result(join(place.path, entry.name), "symlink", "symlink", seconds=seconds)

    # -- a large file, in ranges that several processes share

    def create_for_ranges(self, place: DirectoryPair, entry: Entry) -> None:
        """Make the file that ranges will fill: one hole of the final size. Raises ForkError."""
        dst_fd = self._create(place, entry, None)
        try:
            os.fchmod(dst_fd, 0o600)  # whatever the umask: other processes open it for their ranges
            self._set_size(place, entry, dst_fd, fresh=True)
        except OSError as error:
            raise from_oserror(error, "creating it", place.destination_of(entry.name)) from None
        finally:
            os.close(dst_fd)

    def copy_range(self, place: DirectoryPair, entry: Entry, start: int, end: int) -> int:
        """Copy the data of [start, end) of a file that `create_for_ranges` made; returns the bytes copied."""
        with self._both(place, entry) as (src_fd, dst_fd):
            try:
                copied = self._copy_data(place, entry, src_fd, dst_fd, start, end)
            except ForkError:
                with suppress(OSError):  # the fork has failed: room for the report that says so, on a full filesystem
                    os.ftruncate(dst_fd, 0)
                raise
            self.check_source(place, entry, src_fd)
            if self._options.verify == "content":
                _verify(place, entry, src_fd, dst_fd, start, end)
            return copied

    def complete_ranges(self, place: DirectoryPair, entry: Entry) -> None:
        """Check the file whose ranges are all copied, and give it its metadata. Raises ForkError."""
        with self._both(place, entry) as (src_fd, dst_fd):
            self.check_source(place, entry, src_fd)
            self._complete(place, entry, src_fd, dst_fd, verified=True)
            self.check_source(place, entry, src_fd)  # after its attributes were read

    # -- the steps

    @contextmanager
    def _both(self, place: DirectoryPair, entry: Entry) -> Iterator[tuple[int, int]]:
        src_fd = self.open_source(place, entry)
        try:
            try:
                dst_fd = os.open(entry.name, _OPEN, dir_fd=place.dst_fd)
            except OSError as error:
                raise from_oserror(error, "opening the clone", place.destination_of(entry.name)) from None
            try:
                yield src_fd, dst_fd
            finally:
                os.close(dst_fd)
        finally:
            os.close(src_fd)

    def open_source(self, place: DirectoryPair, entry: Entry) -> int:
        """Open one file of the source for reading; the caller closes it. Raises ForkError."""
        try:
            try:
                return os.open(entry.name, _READ | self._no_atime, dir_fd=place.src_fd)
            except PermissionError:
                # open(2): O_NOATIME is for the owner and the privileged.
                self._no_atime = 0
                return os.open(entry.name, _READ, dir_fd=place.src_fd)
        except OSError as error:
            raise from_source(error, "opening it", place.source_of(entry.name)) from None

    def _create(self, place: DirectoryPair, entry: Entry, src_fd: int | None) -> int:
        mode = 0o600
        if src_fd is not None:
            ours = entry.uid == self._user and entry.gid == self._group
            try:
                mode = self.metadata.mode_to_create(entry, src_fd, ours=ours)
            except OSError as error:
                raise from_source(error, doing(error), place.source_of(entry.name)) from None
        try:
            try:
                return os.open(entry.name, _CREATE, mode, dir_fd=place.dst_fd)
            except FileExistsError:
                return self._make_again(place, entry, partial(os.open, entry.name, _CREATE, mode, dir_fd=place.dst_fd))
        except OSError as error:
            raise from_oserror(error, "creating it", place.destination_of(entry.name)) from None

    def _make_again(self, place: DirectoryPair, entry: Entry, make: Callable[[], T]) -> T:
        """What `make` returns, which makes a file or symlink, in place of the one that exists.

        What an earlier try left is replaced by a fresh inode, so that no old descriptor reaches it. Raises ForkError
        where it is not that, and OSError.
        """
        if self._replaces:
            with suppress(FileExistsError, IsADirectoryError):  # another chunk's: this one never made a directory
                os.unlink(entry.name, dir_fd=place.dst_fd)
                return make()
        raise name_taken(place.src_fd, place.dst_fd, entry.name, place.destination_of(entry.name))

    def _reflink(self, place: DirectoryPair, entry: Entry, src_fd: int, dst_fd: int) -> Refusal | None:
        if self._options.reflink == "never":
            return NOT_ASKED_FOR
        try:
            refusal = self.reflinker.clone(dst_fd, src_fd, entry.dev, place.dst_dev)
            if refusal is None:
                return None
        except OSError as error:
            self.check_source(place, entry, src_fd)  # a directory by now, say: EISDIR
            doing = f"reflinking {place.source_of(entry.name)}"
            raise from_oserror(error, doing, place.destination_of(entry.name)) from None
        if self._options.reflink == "always":
            path = place.source_of(entry.name)
            raise ForkError(Code.REFLINK_UNSUPPORTED, refusal.reason, path, refusal.errno)
        if refusal.asked and self.fallback is None:
            name = join(place.path, entry.name)
            self.fallback = {"reason": refusal.reason, "errno": refusal.errno, "path": name}
        return refusal

    def _copy(self, place: DirectoryPair, entry: Entry, src_fd: int, dst_fd: int, refusal: Refusal) -> int:
        self.check_source(place, entry, src_fd)  # before bytes are read from what may be something else by now
        grows = entry.size <= _GROWN_BYTES and not refusal.asked
        if not grows:
            self._set_size(place, entry, dst_fd, fresh=not refusal.asked)
        copied = self._copy_data(place, entry, src_fd, dst_fd, 0, entry.size)
        if grows and copied < entry.size:  # it may end with a hole
            self._set_size(place, entry, dst_fd, fresh=True)
        return copied

    def _copy_data(self, place: DirectoryPair, entry: Entry, src_fd: int, dst_fd: int, start: int, end: int) -> int:
        part = Part(start, end, entry.size, entry.data)
        return self._sparse.copy(src_fd, entry.dev, dst_fd, part, lambda: place.paths_of(entry.name))

    def _set_size(self, place: DirectoryPair, entry: Entry, dst_fd: int, *, fresh: bool) -> None:
        """Give the file its final size, as a hole after what it holds; `fresh`: no clone was tried on it.

        Empty first: a failed clone may have left something; but not without need, since ext4 writes a file out on
        close that was cut to nothing (auto_da_alloc, ext4(5)). The size before the data: XFS preallocates behind
        the end of a file that grows, and keeps it.
        """
        try:
            if not fresh and os.fstat(dst_fd).st_size:
                os.ftruncate(dst_fd, 0)
            os.ftruncate(dst_fd, entry.size)
        except OSError as error:
            raise from_oserror(error, "setting its size", place.destination_of(entry.name)) from None

    def _complete(
        self, place: DirectoryPair, entry: Entry, src_fd: int, dst_fd: int, *, verified: bool = False
    ) -> None:
        """Check the clone, and give it its metadata."""
        fresh = os.fstat(dst_fd)
        if fresh.st_size != entry.size:  # OpenZFS once truncated the clone and reported success (issue 15728)
            message = f"the clone has {fresh.st_size} bytes where the source has {entry.size}"
            raise ForkError(Code.IO_ERROR, message, place.destination_of(entry.name))
        if self._options.verify == "content" and not verified:
            _verify(place, entry, src_fd, dst_fd, 0, entry.size)
        try:
            self.metadata.apply(dst_fd, fresh, entry, src_fd, place.path)
        except OSError as error:
            raise from_oserror(error, doing(error), place.destination_of(entry.name)) from None

    def check_source(self, place: DirectoryPair, entry: Entry, src_fd: int) -> None:
        """Raise ForkError source_changed when the open source file is not what the walk saw."""
        if not entry.is_still(os.fstat(src_fd)):
            raise ForkError(Code.SOURCE_CHANGED, "it changed while it was cloned", place.source_of(entry.name))

    def _complete_symlink(self, place: DirectoryPair, entry: Entry) -> None:
        """Give a symlink its metadata, then look whether it still is what the walk saw."""
        source, failure = place.source_of(entry.name), None
        try:
            self.metadata.apply_to_symlink(place.dst_fd, entry, place.src_fd, place.path)
        except OSError as error:
            failure = from_oserror(error, doing(error), place.destination_of(entry.name))
        try:
            now = os.stat(entry.name, dir_fd=place.src_fd, follow_symlinks=False)
        except OSError as error:
            raise from_source(error, "looking at a symlink once more", source) from None
        if not entry.is_still(now):
            raise ForkError(Code.SOURCE_CHANGED, "it changed while it was cloned", source)
        if failure is not None:
            raise failure


def _verify(place: DirectoryPair, entry: Entry, src_fd: int, dst_fd: int, start: int, end: int) -> None:
    try:
        at = first_difference(src_fd, dst_fd, start, end)
    except OSError as error:
        raise from_oserror(error, "reading it back", place.destination_of(entry.name)) from None
    if at is not None:
        message = f"it differs from the source at byte {at}"
        raise ForkError(Code.VERIFY_FAILED, message, place.destination_of(entry.name))
