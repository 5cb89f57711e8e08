"""Typed wrappers of Linux system calls that Python does not offer.

Each raises OSError with the kernel's errno. Sources: openat2(2), renameat2(2), syncfs(2), statfs(2), fallocate(2),
ioctl_ficlone(2), prctl(2), statx(2), the kernel's Documentation/filesystems/fiemap.rst and include/uapi/linux/btrfs.h.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

#: _IOW(0x94, 9, int). A wrong number would fail with ENOTTY and every fork would be copied, so a test pins it.
FICLONE = 0x40049409
#: _IOR('f', 1, long), and a flag of it: data is overwritten in place and has no checksums (btrfs).
FS_IOC_GETFLAGS = 0x80086601
FS_NOCOW_FL = 0x00800000
#: _IOWR('f', 11, struct fiemap).
FS_IOC_FIEMAP = 0xC020660B
FIEMAP_FLAG_SYNC = 0x1
FIEMAP_EXTENT_LAST = 0x1
FIEMAP_EXTENT_UNKNOWN = 0x2
FIEMAP_EXTENT_DATA_INLINE = 0x200
FIEMAP_EXTENT_UNWRITTEN = 0x800

RESOLVE_NO_XDEV = 0x01
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
RENAME_NOREPLACE = 0x1
RENAME_EXCHANGE = 0x2
FALLOC_FL_KEEP_SIZE = 0x1
PR_SET_PDEATHSIG = 1

#: f_type of statfs(2), from include/uapi/linux/magic.h and OpenZFS.
OVERLAYFS = 0x794C7630
ZFS = 0x2FC12FC1
BTRFS = 0x9123683E
FUSE = 0x65735546
XFS = 0x58465342
#: ext2, ext3 and ext4.
EXT4 = 0xEF53
TMPFS = 0x01021994
RAMFS = 0x858458F6
F2FS = 0xF2F52010

#: _IOW(0x94, 23, struct btrfs_ioctl_vol_args_v2), _IOW(0x94, 15, struct btrfs_ioctl_vol_args) and
#: _IOR(0x94, 60, struct btrfs_ioctl_get_subvol_info_args).
BTRFS_IOC_SNAP_CREATE_V2 = 0x50009417
BTRFS_IOC_SNAP_DESTROY = 0x5000940F
#: _IOW(0x94, 63, struct btrfs_ioctl_vol_args_v2), since Linux 5.7.
BTRFS_IOC_SNAP_DESTROY_V2 = 0x5000943F
BTRFS_SUBVOL_SPEC_BY_ID = 1 << 4
BTRFS_IOC_GET_SUBVOL_INFO = 0x81F8943C
#: fd, transid, flags, 32 unused bytes, name.
_VOL_ARGS_V2 = struct.Struct("=qQQ32x4040s")
#: fd, name.
_VOL_ARGS = struct.Struct("=q4088s")
#: The first fields: id, name, id of the parent, inode of the parent, generation, flags, UUID.
_SUBVOL_INFO = struct.Struct("=Q256sQQQQ16s")
_SUBVOL_INFO_BYTES = 504

STATX_ATTR_IMMUTABLE = 0x10
STATX_ATTR_APPEND = 0x20
STATX_ATTR_MOUNT_ROOT = 0x2000
STATX_ATTR_VERITY = 0x100000
_STATX_INO, _STATX_BTIME = 0x100, 0x800
_AT_SYMLINK_NOFOLLOW = 0x100
#: This number is the same on every architecture. (That of renameat2 is not, but glibc has a function for it.)
_SYS_OPENAT2 = 437
_SYS_OPEN_TREE, _SYS_MOUNT_SETATTR = 428, 442
_OPEN_TREE_CLONE = 0x1
_AT_EMPTY_PATH, _AT_RECURSIVE = 0x1000, 0x8000
_MOUNT_ATTR_RDONLY, _MOUNT_ATTR_NOATIME, _MOUNT_ATTR_ATIME = 0x1, 0x10, 0x70
_MS_PRIVATE = 1 << 18
#: struct mount_attr: attributes to set and to clear, propagation, user namespace.
_MOUNT_ATTR = struct.Struct("=QQQQ")
#: struct open_how: flags, mode, resolve.
_OPEN_HOW = struct.Struct("=QQQ")
_OPEN_HOW_BYTES = ctypes.c_size_t(_OPEN_HOW.size)
#: openat2 fails with EAGAIN when a rename raced with the lookup (openat2(2)). A few retries are enough.
_OPENAT2_TRIES = 100

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _uninterrupted(function: Callable[..., int], *arguments: object) -> int:
    """Repeat a call after EINTR, as Python does for its own calls (PEP 475)."""
    while True:
        try:
            return _check(function(*arguments))
        except InterruptedError:
            continue


def call(number: int, *arguments: int) -> int:
    """A system call that glibc has no function for, by its number. Returns its result."""
    return _check(_libc.syscall(number, *arguments))


def openat2(dir_fd: int, path: str, flags: int, resolve: int) -> int:
    """Open `path` below `dir_fd` with the RESOLVE_* flags `resolve` and O_CLOEXEC. Returns the descriptor."""
    how, name = _OPEN_HOW.pack(flags | os.O_CLOEXEC, 0, resolve), os.fsencode(path)
    for _ in range(_OPENAT2_TRIES):
        try:
            return _check(_libc.syscall(_SYS_OPENAT2, dir_fd, name, how, _OPEN_HOW_BYTES))
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EINTR):
                raise
    raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))


def release(fd: int) -> None:
    """Close a descriptor through which nothing was written, and ignore errors.

    close(2) releases the descriptor even if it fails, and its errors concern written data.
    """
    with suppress(OSError):
        os.close(fd)


def fstat(fd: int) -> os.stat_result:
    """The status of an open file. Raises FileNotFoundError for one that was removed on FUSE or NFS, and OSError.

    Other filesystems still have it, with no names. These two look up a path or a handle, and report ESTALE.
    """
    try:
        return os.fstat(fd)
    except OSError as error:
        if error.errno == errno.ESTALE:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)) from None
        raise


def write_all(fd: int, data: bytes) -> None:
    """Write all of `data`, with several calls if write(2) accepts only a part. Raises OSError."""
    left = memoryview(data)
    while left:
        left = left[os.write(fd, left) :]


def append_lines(fd: int, lines: bytes) -> None:
    """Append lines to a file at once, also while other processes append to it (pwritev2(2), RWF_APPEND).

    Raises OSError; ENOSPC also if only a part was written. Such a part may end within a line, so each append begins
    with a line end of its own.
    """
    data = b"\n" + lines
    if os.pwritev(fd, [data], 0, os.RWF_APPEND) < len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def rename_noreplace(src_dir_fd: int, src: str, dst_dir_fd: int, dst: str) -> None:
    """Rename, and fail with EEXIST if anything is at `dst`, even a dangling symlink."""
    _check(_libc.renameat2(src_dir_fd, os.fsencode(src), dst_dir_fd, os.fsencode(dst), RENAME_NOREPLACE))


def rename_exchange(src_dir_fd: int, src: str, dst_dir_fd: int, dst: str) -> None:
    """Exchange `src` and `dst` atomically. ENOENT if one of them does not exist."""
    _check(_libc.renameat2(src_dir_fd, os.fsencode(src), dst_dir_fd, os.fsencode(dst), RENAME_EXCHANGE))


def readonly_view(fd: int) -> int:
    """Open the directory `fd` as a private, read-only mount that updates no atime.

    It includes the mounts below the directory, and ends when the descriptor is closed. There is no other way to read a
    symlink without updating its atime. Raises OSError: EPERM without CAP_SYS_ADMIN, ENOSYS before Linux 5.12.
    Sources: open_tree(2), mount_setattr(2), include/uapi/linux/mount.h.
    """
    view = _check(
        _libc.syscall(_SYS_OPEN_TREE, fd, b"", _OPEN_TREE_CLONE | os.O_CLOEXEC | _AT_EMPTY_PATH | _AT_RECURSIVE)
    )
    try:
        attributes = _MOUNT_ATTR.pack(_MOUNT_ATTR_RDONLY | _MOUNT_ATTR_NOATIME, _MOUNT_ATTR_ATIME, _MS_PRIVATE, 0)
        flags, size = _AT_EMPTY_PATH | _AT_RECURSIVE, ctypes.c_size_t(len(attributes))
        _check(_libc.syscall(_SYS_MOUNT_SETATTR, view, b"", flags, attributes, size))
    except BaseException:
        os.close(view)
        raise
    return view


def syncfs(fd: int) -> None:
    """Write the whole filesystem of `fd` to disk."""
    _uninterrupted(_libc.syncfs, fd)


#: How long a result of statfs(2) is cached, in seconds. It covers the calls of one small fork, which takes a
#: millisecond, and is too short for another filesystem to get the same device number.
_TYPE_SECONDS = 0.05
#: st_dev → (time of the call on the monotonic clock, f_type).
_types: dict[int, tuple[float, int]] = {}


def filesystem_type(fd: int, dev: int | None = None) -> int:
    """f_type of the filesystem of `fd`, cached for `_TYPE_SECONDS`. `dev` is its st_dev, if the caller has it.

    On XFS, statfs(2) also removes unlinked inodes (xfs_fs_statfs), which takes 0.1 ms after a fork.
    """
    now = time.monotonic()
    if dev is None:
        dev = os.fstat(fd).st_dev
    asked, kind = _types.get(dev, (-_TYPE_SECONDS, 0))
    if now - asked >= _TYPE_SECONDS:
        buffer = ctypes.create_string_buffer(256)
        _uninterrupted(_libc.fstatfs, fd, buffer)
        kind = int(struct.unpack_from("@l", buffer)[0]) & 0xFFFFFFFF
        _types[dev] = now, kind
    return kind


_fallocate = _libc.fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong)


def allocate(fd: int, start: int, length: int) -> None:
    """Allocate the blocks of `length` bytes of a file from `start`. They read as zeros until they are written.

    The size of the file does not change. `os.posix_fallocate` would write zeros where the filesystem cannot allocate.
    """
    _uninterrupted(_fallocate, fd, FALLOC_FL_KEEP_SIZE, start, length)


def die_with_parent(signal: int) -> None:
    """Make the kernel send `signal` to this process when its parent ends."""
    _check(_libc.prctl(PR_SET_PDEATHSIG, signal, 0, 0, 0))


def ficlone(dst_fd: int, src_fd: int) -> None:
    """Make the file `dst_fd` share all extents of `src_fd`. Atomic with respect to writes to the source."""
    fcntl.ioctl(dst_fd, FICLONE, src_fd)


def file_flags(fd: int) -> int:
    """The FS_*_FL flags of a file or directory (ioctl_iflags(2))."""
    flags = bytearray(8)
    fcntl.ioctl(fd, FS_IOC_GETFLAGS, flags)
    return int(struct.unpack_from("=I", flags)[0])


def create_snapshot(dir_fd: int, name: str, subvolume_fd: int) -> None:
    """Create `name` in `dir_fd` as a writable snapshot of the btrfs subvolume with the root `subvolume_fd`.

    It has the owner and the mode of that root from the beginning. Older kernels accept any directory, and make a
    snapshot of the subvolume that contains it.
    """
    _long_ioctl(dir_fd, BTRFS_IOC_SNAP_CREATE_V2, _VOL_ARGS_V2.pack(subvolume_fd, 0, 0, os.fsencode(name)))


def destroy_subvolume(dir_fd: int, name: str) -> None:
    """Remove the btrfs subvolume `name` of `dir_fd` with its content, in one step. Open files stay open, unlinked.

    EPERM without CAP_SYS_ADMIN, unless the mount option user_subvol_rm_allowed permits it for the owner. EINVAL for
    anything that is not a subvolume.
    """
    _long_ioctl(dir_fd, BTRFS_IOC_SNAP_DESTROY, _VOL_ARGS.pack(0, os.fsencode(name)))


def destroy_opened_subvolume(dir_fd: int, subvolume_fd: int) -> None:
    """Remove an open btrfs subvolume, even if another entry has its name now; see `destroy_subvolume`.

    `dir_fd` is any directory on the same mount. ENOTTY before Linux 5.7.
    """
    number = _subvolume_info(subvolume_fd)[0].to_bytes(8, sys.byteorder)
    _long_ioctl(dir_fd, BTRFS_IOC_SNAP_DESTROY_V2, _VOL_ARGS_V2.pack(0, 0, BTRFS_SUBVOL_SPEC_BY_ID, number))


def _long_ioctl(fd: int, request: int, argument: bytes) -> None:
    """An ioctl that may take seconds. With an argument above 1 KiB, fcntl.ioctl would block all threads meanwhile."""
    _check(_libc.ioctl(fd, ctypes.c_ulong(request), argument))


def subvolume_uuid(fd: int) -> bytes:
    """The UUID of the btrfs subvolume of `fd`. It is unique, across hosts too."""
    uuid: bytes = _subvolume_info(fd)[-1]
    return uuid


def _subvolume_info(fd: int) -> tuple[Any, ...]:
    info = bytearray(_SUBVOL_INFO_BYTES)
    fcntl.ioctl(fd, BTRFS_IOC_GET_SUBVOL_INFO, info)
    return _SUBVOL_INFO.unpack_from(info)


class _Statx(ctypes.Structure):
    """struct statx, with names for the fields that are used."""

    _fields_ = (
        ("mask", ctypes.c_uint32),
        ("blksize", ctypes.c_uint32),
        ("attributes", ctypes.c_uint64),
        ("until_inode", ctypes.c_uint64 * 2),
        ("inode", ctypes.c_uint64),
        ("until_birth", ctypes.c_uint64 * 5),
        ("birth_seconds", ctypes.c_int64),
        ("birth_nanoseconds", ctypes.c_uint32),
        ("rest", ctypes.c_uint32 * 41),
    )


_statx = _libc.statx
_statx.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.POINTER(_Statx))


def attributes(dir_fd: int, name: str) -> int:
    """The STATX_ATTR_* flags of the entry `name` of `dir_fd`. Does not follow a symlink."""
    status = _Statx()
    _check(_statx(dir_fd, os.fsencode(name), _AT_SYMLINK_NOFOLLOW, 0, status))
    return int(status.attributes)


def inode_and_birth(dir_fd: int, name: str) -> tuple[int, int]:
    """The inode of the entry `name` of `dir_fd`, and its time of birth in nanoseconds (0 if it is not recorded)."""
    status = _Statx()
    _check(_statx(dir_fd, os.fsencode(name), _AT_SYMLINK_NOFOLLOW, _STATX_INO | _STATX_BTIME, status))
    if not status.mask & _STATX_BTIME:
        return status.inode, 0
    return status.inode, status.birth_seconds * 10**9 + status.birth_nanoseconds


class Extent(NamedTuple):
    """One mapped extent, in bytes; `flags` are FIEMAP_EXTENT_*."""

    logical: int
    physical: int
    length: int
    flags: int


_FIEMAP_HEADER = struct.Struct("=QQLLLL")
_FIEMAP_EXTENT = struct.Struct("=QQQQQLLLL")
_EXTENTS_A_CALL = 1024


def fiemap(fd: int) -> Iterator[Extent]:
    """Yield the mapped extents of a file in order, after writing its dirty pages to disk.

    Without FIEMAP_FLAG_SYNC, btrfs may report extents that will still change.
    """
    start = 0
    while True:
        header = _FIEMAP_HEADER.pack(start, 2**64 - 1 - start, FIEMAP_FLAG_SYNC, 0, _EXTENTS_A_CALL, 0)
        buffer = bytearray(header + bytes(_FIEMAP_EXTENT.size * _EXTENTS_A_CALL))
        fcntl.ioctl(fd, FS_IOC_FIEMAP, buffer)
        mapped = _FIEMAP_HEADER.unpack_from(buffer)[3]
        for n in range(mapped):
            logical, physical, length, _, _, flags, _, _, _ = _FIEMAP_EXTENT.unpack_from(
                buffer, _FIEMAP_HEADER.size + n * _FIEMAP_EXTENT.size
            )
            yield Extent(logical, physical, length, flags)
            start = logical + length
            if flags & FIEMAP_EXTENT_LAST:
                return
        if mapped == 0:
            return


def fiemap_count(fd: int) -> int:
    """The number of mapped extents of a file, as they are now; dirty pages are not written first."""
    header = bytearray(_FIEMAP_HEADER.pack(0, 2**64 - 1, 0, 0, 0, 0))
    fcntl.ioctl(fd, FS_IOC_FIEMAP, header)
    return int(_FIEMAP_HEADER.unpack(header)[3])
