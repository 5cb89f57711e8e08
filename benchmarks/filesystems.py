"""Filesystems to measure on: new ones on loop devices, or a given directory.

A run leaves nothing behind, even if it is killed: its mounts are in its own mount namespace and end with it, and an
image is unlinked as soon as it is mounted, so the kernel frees its blocks and its loop device with the mount.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tasks.copier.kernel.syscalls import ficlone

_CLONE_NEWNS = 0x00020000  # <linux/sched.h>
_MS_REC, _MS_PRIVATE = 1 << 14, 1 << 18  # <linux/mount.h>
_MNT_DETACH = 2

#: Bytes that a filesystem needs for itself: journal, tables, reserve.
_OWN_BYTES = 1 << 30
#: Bytes that stay free on the disk of an image, or in memory beside a tmpfs.
_SPARE_BYTES = 2 << 30

_MKFS = {
    "xfs": ("mkfs.xfs", "-q", "-m", "reflink=1"),
    "btrfs": ("mkfs.btrfs", "-q"),
    # -i: one inode a block, since files may be empty. XFS and btrfs allocate inodes on demand.
    "ext4": ("mkfs.ext4", "-q", "-i", "4096", "-E", "lazy_itable_init=1,nodiscard"),
}
#: noinit_itable: otherwise a kernel thread writes inode tables during the measurement.
_MOUNT_OPTIONS = {"xfs": "loop", "btrfs": "loop", "ext4": "loop,noinit_itable"}

KINDS = (*_MKFS, "tmpfs")


class Unavailable(Exception):
    """A filesystem cannot be made on this machine. The message says why."""


@dataclass(frozen=True)
class Filesystem:
    """A mounted filesystem."""

    #: Its type, as the kernel names it.
    name: str
    #: A directory on it that only this run uses.
    path: Path
    #: Whether FICLONE works on it.
    reflink: bool


def enter_mount_namespace() -> None:
    """Make mounts of this process and its later children invisible to all others. Raises Unavailable."""
    # unshare(2) is in Python only from 3.12 on.
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS) != 0 or libc.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None) != 0:
        raise Unavailable(f"cannot make a mount namespace ({os.strerror(ctypes.get_errno())})")


def room_for(kind: str, images: Path) -> int:
    """Bytes that a new filesystem of this kind, with its image in `images`, has for cases."""
    free = _available_memory() if kind == "tmpfs" else shutil.disk_usage(images).free
    return free - _SPARE_BYTES - _OWN_BYTES


@contextlib.contextmanager
def made(kind: str, room: int, mounts: Path, images: Path) -> Iterator[Filesystem]:
    """Mount a new filesystem with `room` bytes in it, below `mounts`, for the time of a with block.

    Raises Unavailable.
    """
    size = room + _OWN_BYTES
    if kind == "tmpfs":
        with _mounted(mounts / kind, "-t", "tmpfs", "-o", f"size={size}", "tmpfs") as point:
            yield Filesystem(kind, point, reflink=False)
        return
    with contextlib.ExitStack() as mount:
        with tempfile.NamedTemporaryFile(prefix=f"forkvm-bench-{kind}-", suffix=".img", dir=images) as image:
            image.truncate(size)
            _run(*_MKFS[kind], image.name)
            point = mount.enter_context(_mounted(mounts / kind, "-o", _MOUNT_OPTIONS[kind], image.name))
        yield Filesystem(kind, point, _can_reflink(point))


@contextlib.contextmanager
def given(directory: Path) -> Iterator[Filesystem]:
    """A new directory in the given one, for the time of a with block."""
    path = Path(tempfile.mkdtemp(prefix="forkvm-bench-", dir=directory)).resolve()
    try:
        yield Filesystem(_type_of(path), path, _can_reflink(path))
    finally:
        subprocess.run(["rm", "-rf", "--", str(path)], check=False)


def _can_reflink(directory: Path) -> bool:
    with tempfile.TemporaryFile(dir=directory) as source, tempfile.TemporaryFile(dir=directory) as clone:
        source.write(bytes(4096))
        source.flush()
        try:
            ficlone(clone.fileno(), source.fileno())
        except OSError:
            return False
        return True


def _type_of(path: Path) -> str:
    best = ("", "unknown")
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        point, kind = line.split()[4], line.rpartition(" - ")[2].split()[0]
        if path.is_relative_to(point) and len(point) >= len(best[0]):
            best = (point, kind)
    return best[1]


def _available_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 0


@contextlib.contextmanager
def _mounted(point: Path, *arguments: str) -> Iterator[Path]:
    point.mkdir()
    try:
        _run("mount", *arguments, str(point))
        try:
            yield point
        finally:
            _unmount(point)
    finally:
        point.rmdir()


def _unmount(point: Path) -> None:
    """Unmount, also while a process that has not ended yet uses the filesystem."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.umount2(os.fsencode(point), 0) != 0 and libc.umount2(os.fsencode(point), _MNT_DETACH) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(point))


def _run(command: str, *arguments: str) -> None:
    # mkfs is often in a directory that is not on PATH.
    path = f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin:/sbin"
    executable = shutil.which(command, path=path)
    if executable is None:
        raise Unavailable(f"{command} is not installed")
    done = subprocess.run([executable, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"{command}: {done.stderr.strip()}")
