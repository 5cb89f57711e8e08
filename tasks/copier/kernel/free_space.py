"""The free space of a filesystem, which filesystem it is, and whether it stores data in fewer bytes than it has.

Sources: statvfs(3), fs/btrfs/super.c (btrfs_statfs), include/uapi/linux/btrfs.h, ioctl_iflags(2).
"""

from __future__ import annotations

import fcntl
import os
import struct

from tasks.copier.kernel import syscalls
from tasks.copier.kernel.mounts import mount_of

#: _IOR(0x94, 31, struct btrfs_ioctl_fs_info_args): 1,024 bytes; the UUID is 16 bytes long and begins at byte 16.
_BTRFS_IOC_FS_INFO = 0x8400941F
_FS_INFO = struct.Struct("=16x16s992x")
_FS_COMPR_FL = 0x4
#: Filesystems that compress by default, or by settings that cannot be read here: OpenZFS and bcachefs.
_COMPRESS = frozenset({syscalls.ZFS, 0xCA451A4E})


def free_bytes(fd: int) -> int | None:
    """The bytes that a process without privileges may still write to the filesystem of `fd`; None if it reports none.

    Raises OSError. Some FUSE and network filesystems report no size, nor does a tmpfs without a limit. btrfs reports 0
    while its metadata is nearly full, although data can be written; there the free blocks count.
    """
    status = os.statvfs(fd)
    if not status.f_blocks:
        return None
    free = status.f_bavail
    if not free and syscalls.filesystem_type(fd) == syscalls.BTRFS:
        free = status.f_bfree
    return free * status.f_frsize


def free_inodes(fd: int) -> int | None:
    """The files that can still be made on the filesystem of `fd`; None if there is no such limit. Raises OSError."""
    status = os.statvfs(fd)
    return status.f_favail if status.f_files else None


def filesystem_id(fd: int) -> bytes:
    """16 bytes that are equal for two descriptors of one filesystem on this host. Raises OSError.

    On btrfs each subvolume has a device number of its own.
    """
    if syscalls.filesystem_type(fd) == syscalls.BTRFS:
        info = bytearray(_FS_INFO.size)
        fcntl.ioctl(fd, _BTRFS_IOC_FS_INFO, info)
        (uuid,) = _FS_INFO.unpack(info)
        return bytes(uuid)
    return os.fstat(fd).st_dev.to_bytes(16, "little")


def may_compress(fd: int) -> bool:
    """Whether new files in the directory `fd` may take fewer bytes on disk than they have. Raises OSError."""
    kind = syscalls.filesystem_type(fd)
    if kind in _COMPRESS:
        return True
    if kind != syscalls.BTRFS:
        return False
    mount = mount_of(fd)  # by its id: the device number of a subvolume is not that of its mount
    options = mount.options if mount is not None else ()
    return bool(syscalls.file_flags(fd) & _FS_COMPR_FL) or any(option.startswith("compress") for option in options)
