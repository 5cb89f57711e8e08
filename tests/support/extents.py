"""The extents of a file: its data and holes, its size on disk, the bytes that it shares with other files."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path

# <linux/fs.h>, <linux/fiemap.h>
_FS_IOC_GETFLAGS = 0x80086601
_FS_IOC_SETFLAGS = 0x40086602
_FS_NOCOW_FL = 0x00800000
_FS_COMPR_FL = 0x4
_FS_LOCKS = {"immutable": 0x10, "append-only": 0x20}
_FS_IOC_FIEMAP = 0xC020660B
_FIEMAP_FLAG_SYNC = 0x1
_FIEMAP_EXTENT_LAST = 0x1
_FIEMAP_EXTENT_UNWRITTEN = 0x800
_FIEMAP_EXTENT_SHARED = 0x2000
_FIEMAP_HEADER = struct.Struct("=QQIIII")
_FIEMAP_EXTENT = struct.Struct("=QQQQQIIII")
_EXTENTS_A_CALL = 256


def data_extents(path: str | bytes | os.PathLike[str]) -> list[tuple[int, int]]:
    """The file's data as (start, end) pairs in bytes, as reported by SEEK_DATA and SEEK_HOLE."""
    extents: list[tuple[int, int]] = []
    fd = os.open(path, os.O_RDONLY)
    try:
        end = 0
        while True:
            try:
                start = os.lseek(fd, end, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:  # only a hole from here on
                    return extents
                raise
            end = os.lseek(fd, start, os.SEEK_HOLE)
            extents.append((start, end))
    finally:
        os.close(fd)


def allocated_bytes(path: str | bytes | os.PathLike[str]) -> int:
    """The bytes that a file occupies on disk (shared extents are counted for each file)."""
    return os.lstat(path).st_blocks * 512


def allocated_bytes_of_tree(root: str | os.PathLike[str]) -> int:
    """The bytes on disk of all regular files below `root`, a hard-linked one counted once."""
    allocated: dict[tuple[int, int], int] = {}
    for directory, _, names in os.walk(os.fsencode(root)):
        for name in names:
            status = os.lstat(os.path.join(directory, name))
            if stat.S_ISREG(status.st_mode):
                allocated[status.st_dev, status.st_ino] = status.st_blocks * 512
    return sum(allocated.values())


@dataclass(frozen=True, kw_only=True)
class MappedExtent:
    """One extent as reported by FIEMAP; positions and length in bytes."""

    logical: int
    physical: int
    length: int
    flags: int

    @property
    def shared(self) -> bool:
        return bool(self.flags & _FIEMAP_EXTENT_SHARED)

    @property
    def unwritten(self) -> bool:
        """Reserved on disk, but reads as zeros: XFS does so between scattered writes, and reflinks it as a hole."""
        return bool(self.flags & _FIEMAP_EXTENT_UNWRITTEN)


def fiemap(path: str | bytes | os.PathLike[str]) -> list[MappedExtent]:
    """All extents of a file, after its dirty pages were written (before that they have no position yet).

    Raises OSError (EOPNOTSUPP) on a filesystem without FIEMAP, such as tmpfs.
    """
    extents: list[MappedExtent] = []
    fd = os.open(path, os.O_RDONLY)
    try:
        position = 0
        while True:
            request = bytearray(_FIEMAP_HEADER.size + _EXTENTS_A_CALL * _FIEMAP_EXTENT.size)
            _FIEMAP_HEADER.pack_into(
                request, 0, position, 2**64 - 1 - position, _FIEMAP_FLAG_SYNC, 0, _EXTENTS_A_CALL, 0
            )
            fcntl.ioctl(fd, _FS_IOC_FIEMAP, request)
            mapped = _FIEMAP_HEADER.unpack_from(request)[3]
            for index in range(mapped):
                offset = _FIEMAP_HEADER.size + index * _FIEMAP_EXTENT.size
                logical, physical, length, _, _, flags, *_ = _FIEMAP_EXTENT.unpack_from(request, offset)
                extents.append(MappedExtent(logical=logical, physical=physical, length=length, flags=flags))
                position = logical + length
                if flags & _FIEMAP_EXTENT_LAST:
                    return extents
            if not mapped:
                return extents
    finally:
        os.close(fd)


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """The number of a file's bytes that are written on disk, and how many of them it shares with another file."""

    mapped: int
    shared: int

    @property
    def whole(self) -> bool:
        """Whether all mapped bytes are shared, and at least one byte is mapped."""
        return self.mapped > 0 and self.shared == self.mapped


def sharing(path: str | bytes | os.PathLike[str]) -> Sharing:
    """Add up FIEMAP for a file, without reserved space (unwritten, or beyond the file's size).

    btrfs may store a file of up to 2 KiB in its metadata, and such an extent is never shared.
    """
    size = os.stat(path).st_size
    mapped = shared = 0
    for extent in fiemap(path):
        if extent.unwritten:
            continue
        length = max(0, min(extent.logical + extent.length, size) - extent.logical)
        mapped += length
        shared += length if extent.shared else 0
    return Sharing(mapped=mapped, shared=shared)


def set_nocow(path: Path) -> None:
    """Make an empty btrfs file NOCOW (`chattr +C`): FICLONE between it and a COW file is EINVAL."""
    _set_flag(path, _FS_NOCOW_FL, on=True)


def set_compressed(path: Path) -> None:
    """Make btrfs compress what is written to a file, or to new files in a directory (`chattr +c`)."""
    _set_flag(path, _FS_COMPR_FL, on=True)


def set_lock(path: Path, lock: str, *, on: bool) -> None:
    """Make a file or directory `immutable` or `append-only`, or writable again (`chattr +i`, `-i`, `+a`, `-a`)."""
    _set_flag(path, _FS_LOCKS[lock], on=on)


def _set_flag(path: Path, flag: int, *, on: bool) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        flags = bytearray(8)
        fcntl.ioctl(fd, _FS_IOC_GETFLAGS, flags)
        (value,) = struct.unpack_from("=I", flags)
        struct.pack_into("=I", flags, 0, value | flag if on else value & ~flag)
        fcntl.ioctl(fd, _FS_IOC_SETFLAGS, flags)
    finally:
        os.close(fd)
