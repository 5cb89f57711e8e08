"""Clones files and symlinks: FICLONE first, then copy_file_range, then pread and pwrite."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from tasks.copier.clone.metadata import Metadata, doing
from tasks.copier.clone.name_collisions import name_taken
from tasks.copier.clone.reflinker import NOT_ASKED_FOR, Reflinker, Refusal
from tasks.copier.clone.sparse_copy import OpenPair, Part, SparseCopier, Step, Take
from tasks.copier.clone.write_behind import WriteBehind
from tasks.copier.errors import Code, ForkError, from_oserror, from_source
from tasks.copier.kernel.contents import first_difference
from tasks.copier.kernel.leases import open_leased
from tasks.copier.options import Options
from tasks.copier.report import Fallback, FileResult, Method, file_result
from tasks.copier.source.read_leases import leases_of_process
from tasks.copier.source.walk import Entry, Kind, join

T = TypeVar("T")

#: O_NONBLOCK: opening a FIFO that replaced a file must not block.
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = int(Kind.FILE)
#: Files of at most this many bytes get their size from the writes, which saves a call (5 us on ext4). By default, XFS
#: does not preallocate space after a file of this size.
_GROWN_BYTES = 64 << 10
_OPEN = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class DirectoryPair:
    """A directory of the source and its clone, both open."""

    src_fd: int
    dst_fd: int
    #: st_dev of the clone.
    dst_dev: int
    #: The path of the directory, relative to the source.
    path: str
    #: The absolute paths of the source and the destination of the fork, for messages.
    source: str
    destination: str

    def source_of(self, name: str) -> str:
        """The absolute source path of the entry `name`."""
        return join(self.source, join(self.path, name))

    def destination_of(self, name: str) -> str:
        """The absolute path of the entry `name` in the finished fork."""
        return join(self.destination, join(self.path, name))

    def paths_of(self, name: str) -> tuple[str, str]:
        """The source path and the destination path of the entry `name`."""
        return self.source_of(name), self.destination_of(name)


class ReflinkRefused(Exception):
    """The reflink of a file that must not be copied was refused. Nothing of the file is left."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal)
        self.refusal = refusal


class Cloner:
    """Clones entries of one fork. It keeps the refused pairs of filesystems, the first fallback, and a buffer."""

    def __init__(
        self, options: Options, refused: dict[tuple[int, int], int], step: Step, *, replaces: bool = False
    ) -> None:
        """`step` is called with the number of bytes just copied, and raises to stop.

        `refused`: see `Reflinker`. `replaces`: replace entries that exist, since an earlier attempt of the same work
        may have left them. Otherwise an entry that exists is an error.
        """
        self.reflinker = Reflinker(refused)
        self.metadata = Metadata(options.preserve)
        self.fallback: Fallback | None = None
        self._options, self._replaces, self._step = options, replaces, step
        self._drops = options.cache == "drop"
        self._is_slowed = False  # the last copy, by the copy rate
        self._sparse = SparseCopier(offload=options.reflink != "never", drops=self._drops)
        self._leases = leases_of_process(os.getpid()) if options.source_open == "refuse" else None
        self._user, self._group = os.geteuid(), os.getegid()
        self._no_atime = os.O_NOATIME

    def use_budget(self, take: Take) -> None:
        """Call `take` with the number of bytes before they are copied; if it returns False, the file fails."""
        self._sparse.take = take

    # -- whole entries

    def entry(self, place: DirectoryPair, entry: Entry) -> FileResult:
        """Clone one file or symlink. Raises ForkError, and then leaves nothing of the entry."""
        return self.file(place, entry) if entry.kind == _FILE else self._symlink(place, entry)

    def file(self, place: DirectoryPair, entry: Entry, *, may_copy: bool = True) -> FileResult:
        """Clone one regular file. Raises ForkError; ReflinkRefused instead of a copy if not `may_copy`."""
        src_fd = self.open_source(place, entry)
        try:
            return self.file_from(src_fd, place, entry, may_copy=may_copy)
        finally:
            self.close_source(src_fd)

    def file_from(
        self, src_fd: int, place: DirectoryPair, entry: Entry, *, may_copy: bool = True, check: bool = True
    ) -> FileResult:
        """Clone a regular file that `open_source` opened; see `file`.

        `check`: call `check_source` at the end. A caller that makes several clones can call it once instead, after the
        last one.
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
                self.check_source(place, entry, src_fd)  # after its attributes were read
        except ReflinkRefused:
            try:
                os.unlink(entry.name, dir_fd=place.dst_fd)
            except OSError as error:  # the file is created again, as a copy
                doing_so = "removing the empty file after a refused reflink"
                raise from_oserror(error, doing_so, place.destination_of(entry.name)) from None
            raise
        except BaseException as error:
            with suppress(OSError):
                os.unlink(entry.name, dir_fd=place.dst_fd)
            self._blame_source(error, place, entry, src_fd)
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
            if error.errno == errno.EINVAL:  # it is not a symlink any more (readlink(2))
                message = "the symlink was replaced while it was being cloned"
                raise ForkError(Code.SOURCE_CHANGED, message, source) from None
            raise from_source(error, "reading the symlink", source) from None
        try:
            try:
                os.symlink(target, entry.name, dir_fd=place.dst_fd)
            except FileExistsError:
                self._make_again(place, entry, lambda: os.symlink(target, entry.name, dir_fd=place.dst_fd))
        except OSError as error:
            raise from_oserror(error, "creating the symlink", place.destination_of(entry.name)) from None
        try:
            self._complete_symlink(place, entry)
        except BaseException:
            with suppress(OSError):
                os.unlink(entry.name, dir_fd=place.dst_fd)
            raise
        seconds = time.perf_counter() - began
        return file_result(join(place.path, entry.name), "symlink", "symlink", seconds=seconds)

    # -- a large file, in ranges that several processes copy

    def create_for_ranges(self, place: DirectoryPair, entry: Entry) -> None:
        """Create the file for `copy_range`: a hole of the final size. Raises ForkError."""
        dst_fd = self._create(place, entry, None)
        try:
            os.fchmod(dst_fd, 0o600)  # regardless of the umask: other processes open it for their ranges
            self._set_size(place, entry, dst_fd, fresh=True)
        except OSError as error:
            raise from_oserror(error, "creating the file", place.destination_of(entry.name)) from None
        finally:
            os.close(dst_fd)

    def copy_range(self, place: DirectoryPair, entry: Entry, start: int, end: int) -> int:
        """Copy the data of [start, end) of a file. Returns the number of bytes copied. Raises ForkError."""
        with self._both(place, entry) as (src_fd, dst_fd):
            try:
                copied = self._copy_data(place, entry, src_fd, dst_fd, start, end)
            except ForkError as error:
                with suppress(OSError):  # free space for the report of the failed fork, if the filesystem is full
                    os.ftruncate(dst_fd, 0)
                self._blame_source(error, place, entry, src_fd)
                raise
            self.check_source(place, entry, src_fd)
            if self._options.verify == "content":
                _verify(place, entry, src_fd, dst_fd, start, end)
            return copied

    def complete_ranges(self, place: DirectoryPair, entry: Entry) -> None:
        """Check a file whose ranges are all copied, and set its metadata. Raises ForkError."""
        with self._both(place, entry) as (src_fd, dst_fd):
            self.check_source(place, entry, src_fd)
            self._complete(place, entry, src_fd, dst_fd, verified=True)
            self.check_source(place, entry, src_fd)  # after its attributes were read

    # -- the steps

    @contextmanager
    def _both(self, place: DirectoryPair, entry: Entry) -> Iterator[tuple[int, int]]:
        with ExitStack() as opened:
            src_fd = self.open_source(place, entry)
            opened.callback(self.close_source, src_fd)
            try:
                dst_fd = os.open(entry.name, _OPEN, dir_fd=place.dst_fd)
            except OSError as error:
                raise from_oserror(error, "opening the clone", place.destination_of(entry.name)) from None
            opened.callback(os.close, dst_fd)
            yield src_fd, dst_fd

    def open_source(self, place: DirectoryPair, entry: Entry) -> int:
        """Open a file of the source for reading. Returns a descriptor for `close_source`. Raises ForkError.

        With `source_open: refuse` the file is leased until it is closed.
        """
        src_fd = self._open_to_read(place, entry)
        if self._leases is not None:
            try:
                self._leases.take(src_fd, place.source_of(entry.name))
            except BaseException:
                os.close(src_fd)
                raise
        return src_fd

    def close_source(self, src_fd: int) -> None:
        """Close a file that `open_source` opened."""
        if self._leases is not None:
            self._leases.release(src_fd)
        os.close(src_fd)

    def _open_to_read(self, place: DirectoryPair, entry: Entry) -> int:
        try:
            try:
                return open_leased(entry.name, _READ | self._no_atime, place.src_fd)
            except PermissionError:
                # open(2): O_NOATIME needs ownership or privilege.
                self._no_atime = 0
                return open_leased(entry.name, _READ, place.src_fd)
        except OSError as error:
            raise from_source(error, "opening the file", place.source_of(entry.name)) from None

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
            raise from_oserror(error, "creating the file", place.destination_of(entry.name)) from None

    def _make_again(self, place: DirectoryPair, entry: Entry, make: Callable[[], T]) -> T:
        """Remove the existing entry, then call `make`, which creates a file or symlink. Returns its result.

        The new inode cannot be written through a descriptor of an earlier attempt. Raises ForkError if the existing
        entry cannot be of an earlier attempt, and OSError.
        """
        if self._replaces:
            with suppress(FileExistsError, IsADirectoryError):  # it is of another chunk
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
            self.check_source(place, entry, src_fd)  # it may be a directory now (EISDIR)
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
        self.check_source(place, entry, src_fd)  # before reading from a file that may have been replaced
        grows = entry.size <= _GROWN_BYTES and not refusal.asked
        if not grows:
            self._set_size(place, entry, dst_fd, fresh=not refusal.asked)
        copied = self._copy_data(place, entry, src_fd, dst_fd, 0, entry.size)
        if grows and copied < entry.size:  # the file may end with a hole
            self._set_size(place, entry, dst_fd, fresh=True)
        return copied

    def _copy_data(self, place: DirectoryPair, entry: Entry, src_fd: int, dst_fd: int, start: int, end: int) -> int:
        def step(count: int) -> None:
            began = time.monotonic()
            self._step(count)
            behind.waited(time.monotonic() - began)
            self._require_lease(place, entry, src_fd)

        behind = WriteBehind(dst_fd, start, drops=self._drops, is_slowed=self._is_slowed)
        try:
            pair = OpenPair(src_fd, entry.dev, dst_fd, lambda: place.paths_of(entry.name), step, behind)
            return self._sparse.copy(pair, Part(start, end, entry.size, entry.data))
        finally:
            behind.stop()
            self._is_slowed = behind.is_slowed

    def _require_lease(self, place: DirectoryPair, entry: Entry, src_fd: int) -> None:
        if self._leases is not None:
            self._leases.require(src_fd, place.source_of(entry.name))

    def _set_size(self, place: DirectoryPair, entry: Entry, dst_fd: int, *, fresh: bool) -> None:
        """Set the final size of the file, before its data. `fresh`: no reflink was tried on it.

        A refused reflink may have left data, so the file is truncated to 0 first, but only if it is not empty: ext4
        writes a file to disk on close after such a truncation (auto_da_alloc, ext4(5)). The size comes before the data
        because XFS preallocates space after the end of a growing file, and keeps it.
        """
        try:
            if not fresh and os.fstat(dst_fd).st_size:
                os.ftruncate(dst_fd, 0)
            os.ftruncate(dst_fd, entry.size)
        except OSError as error:
            raise from_oserror(error, "setting the size of the file", place.destination_of(entry.name)) from None

    def _complete(
        self, place: DirectoryPair, entry: Entry, src_fd: int, dst_fd: int, *, verified: bool = False
    ) -> None:
        """Check the clone, and set its metadata."""
        fresh = os.fstat(dst_fd)
        if fresh.st_size != entry.size:  # OpenZFS once truncated the clone and reported success (issue 15728)
            message = f"the clone has {fresh.st_size} bytes, the source has {entry.size}"
            raise ForkError(Code.IO_ERROR, message, place.destination_of(entry.name))
        if self._options.verify == "content" and not verified:
            _verify(place, entry, src_fd, dst_fd, 0, entry.size)
        try:
            self.metadata.apply(dst_fd, fresh, entry, src_fd, place.path)
        except OSError as error:
            raise from_oserror(error, doing(error), place.destination_of(entry.name)) from None

    def _blame_source(self, error: BaseException, place: DirectoryPair, entry: Entry, src_fd: int) -> None:
        """Raise the error of a source file that changed, if that may be the cause of `error`."""
        if isinstance(error, ForkError) and error.code is not Code.CANCELLED:
            self.check_source(place, entry, src_fd)

    def check_source(self, place: DirectoryPair, entry: Entry, src_fd: int) -> None:
        """Raise ForkError if the open source file changed since the walk, or was opened for writing and is leased."""
        self._require_lease(place, entry, src_fd)
        if not entry.is_still(os.fstat(src_fd)):
            message = "the file changed while it was being cloned"
            raise ForkError(Code.SOURCE_CHANGED, message, place.source_of(entry.name))

    def _complete_symlink(self, place: DirectoryPair, entry: Entry) -> None:
        """Set the metadata of a symlink, then check that the source symlink did not change."""
        source, failure = place.source_of(entry.name), None
        try:
            self.metadata.apply_to_symlink(place.dst_fd, entry, place.src_fd, place.path)
        except OSError as error:
            failure = from_oserror(error, doing(error), place.destination_of(entry.name))
        try:
            now = os.stat(entry.name, dir_fd=place.src_fd, follow_symlinks=False)
        except OSError as error:
            raise from_source(error, "reading the status of the symlink again", source) from None
        if not entry.is_still(now):
            raise ForkError(Code.SOURCE_CHANGED, "the symlink changed while it was being cloned", source)
        if failure is not None:
            raise failure


def _verify(place: DirectoryPair, entry: Entry, src_fd: int, dst_fd: int, start: int, end: int) -> None:
    try:
        at = first_difference(src_fd, dst_fd, start, end)
    except OSError as error:
        raise from_oserror(error, "reading the clone to verify it", place.destination_of(entry.name)) from None
    if at is not None:
        message = f"the clone differs from the source at byte {at}"
        raise ForkError(Code.VERIFY_FAILED, message, place.destination_of(entry.name))
