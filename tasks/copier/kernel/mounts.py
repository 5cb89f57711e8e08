"""Mounts: their options, filesystems that other hosts may mount too, and mount points below a directory.

Sources: statfs(2), include/uapi/linux/magic.h, coreutils' src/stat.c (its "remote" types), proc_pid_mountinfo(5).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import NamedTuple

from tasks.copier.kernel import syscalls

_MOUNTINFO = "/proc/self/mountinfo"
#: f_type of network, cluster and user-space filesystems. virtiofs reports the type of FUSE.
_SHARED_TYPES = frozenset(
    {
        0x6969,  # NFS
        0x517B,  # SMB
        0xFF534D42,  # CIFS
        0xFE534D42,  # SMB2 and later
        syscalls.FUSE,
        0x00C36400,  # Ceph
        0x01021997,  # 9p
        0x01161970,  # GFS2
        0x7461636F,  # OCFS2
        0x47504653,  # GPFS
        0x0BD00BD0,  # Lustre
        0x5346414F,  # AFS
        0x6B414653,  # kAFS
        0x73757245,  # Coda
        0x20030528,  # OrangeFS
        0x19830326,  # BeeGFS
        0xAAD7AAEA,  # PanFS
        0x61636673,  # ACFS
        0xA501FCF5,  # VxFS
        0xBACBACBC,  # VMware's shared folders
        0x786F4256,  # VirtualBox's shared folders
        0x7C7C6673,  # Parallels' shared folders
    }
)
#: Mount options that make flock local to this host: nfs(5), mount.cifs(8), Lustre, OCFS2, GFS2.
_LOCAL_LOCKS = frozenset(
    {"nolock", "local_lock=flock", "local_lock=all", "nobrl", "localflock", "localflocks", "noflock"}
)
#: In mountinfo, space, tab, newline and backslash are octal escapes.
_ESCAPE = re.compile(rb"\\([0-7]{3})")


class Mount(NamedTuple):
    """One mount. The options are those of the mount and of the filesystem."""

    id: int
    point: str
    device: int
    kind: str
    #: The device, or what else the filesystem was mounted from.
    source: str
    options: frozenset[str]


def may_be_shared(fd: int) -> bool:
    """Whether the filesystem of `fd` is of a type that several hosts can mount at once. Raises OSError."""
    return syscalls.filesystem_type(fd) in _SHARED_TYPES


def local_lock_options(fd: int) -> list[str]:
    """The options of the mount of `fd` that make flock local to this host. Raises OSError."""
    device = os.fstat(fd).st_dev
    return sorted({option for mount in _mounts() if mount.device == device for option in mount.options & _LOCAL_LOCKS})


def mount_of(fd: int) -> Mount | None:
    """The mount that `fd` was opened in; None if /proc is not mounted."""
    try:
        with open(f"/proc/self/fdinfo/{fd}", "rb") as file:
            number = next((int(line.split()[1]) for line in file if line.startswith(b"mnt_id:")), None)
    except OSError:
        return None
    return next((mount for mount in _mounts() if mount.id == number), None)


def maps_owners(fd: int) -> bool:
    """Whether owners seen through the mount of `fd` may differ from the stored ones (mount_setattr(2), idmapped)."""
    mount = mount_of(fd)
    return mount is None or "idmapped" in mount.options


def mount_points_below(directory: str) -> list[str]:
    """The mount points below `directory`, without automounts that are not in use."""
    top = os.path.realpath(directory).rstrip("/") + "/"
    points = (mount.point for mount in _mounts() if mount.kind != "autofs")
    return sorted({point for point in points if point.startswith(top) and point != top})


def _mounts() -> Iterator[Mount]:
    """The mounts in the namespace of this process; none if /proc is not mounted."""
    try:
        with open(_MOUNTINFO, "rb") as file:
            lines = (file.read() or b"").splitlines()  # None for EAGAIN
    except OSError:
        return
    for line in lines:
        before, _, after = line.partition(b" - ")
        number, _, device, _, point, mount_options, *_ = before.split(b" ")
        kind, source, super_options = after.split(b" ", 2)
        major, _, minor = device.partition(b":")
        options = os.fsdecode(mount_options + b"," + super_options).split(",")
        yield Mount(
            int(number),
            _unescaped(point),
            os.makedev(int(major), int(minor)),
            os.fsdecode(kind),
            _unescaped(source),
            frozenset(options),
        )


def _unescaped(text: bytes) -> str:
    return os.fsdecode(_ESCAPE.sub(lambda found: bytes([int(found[1], 8)]), text))
