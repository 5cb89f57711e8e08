"""Names of filesystems, as in /proc/filesystems."""

from __future__ import annotations

import os

from tasks.copier.kernel import syscalls

#: By f_type of statfs(2). From include/uapi/linux/magic.h, fs/bcachefs and OpenZFS.
_NAMES = {
    syscalls.XFS: "xfs",
    syscalls.BTRFS: "btrfs",
    syscalls.ZFS: "zfs",
    syscalls.OVERLAYFS: "overlay",
    syscalls.EXT4: "ext4",
    syscalls.TMPFS: "tmpfs",
    syscalls.RAMFS: "ramfs",
    syscalls.F2FS: "f2fs",
    0xCA451A4E: "bcachefs",
    0x6969: "nfs",
    0xFF534D42: "cifs",
    0xFE534D42: "smb3",
    0x65735546: "fuse",
    0x00C36400: "ceph",
    0x01021997: "9p",
    0x01161970: "gfs2",
    0x7461636F: "ocfs2",
    0x4D44: "vfat",
}


def name_of_filesystem(path: str) -> str:
    """The name of the filesystem at `path`; its f_type in hexadecimal if unknown, "" if `path` cannot be opened."""
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        number = syscalls.filesystem_type(fd)
    except OSError:
        return ""
    finally:
        os.close(fd)
    return _NAMES.get(number, f"{number:#x}")
