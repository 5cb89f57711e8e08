"""The check whether FORKVM_IO_PRIORITY has an effect: the I/O scheduler of each root's disks must know priorities.

bfq knows classes and levels, mq-deadline knows classes only (ioprio_set(2), Documentation/block/ioprio.rst and
block/mq-deadline.c of Linux 5.14 and later). `none` and kyber ignore both.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from tasks.copier.kernel import mounts
from worker.checks.check import Check

_DEVICES = Path("/sys/dev/block")
#: The scheduler that knows all priorities, and the one that knows classes: each best-effort is one of them.
_LEVELS, _CLASSES = "bfq", "mq-deadline"


def priority_checks(priority: str, roots: tuple[str, ...]) -> Iterator[Check]:
    """A warning for each root on a disk whose scheduler ignores `priority`. A root without a known disk has none."""
    if priority == "none":
        return
    for root in roots:
        found = [f"{disk} has {name}" for disk, name in _schedulers(root) if not _knows(name, priority)]
        if found:
            yield Check(
                "setting FORKVM_IO_PRIORITY",
                "warn",
                f"{priority} has no effect in {root}: {', '.join(found)} as its I/O scheduler",
                f"write {_LEVELS} to /sys/block/DISK/queue/scheduler, or remove the setting; FORKVM_COPY_RATE works",
            )


def _knows(scheduler: str, priority: str) -> bool:
    return scheduler == _LEVELS or (scheduler == _CLASSES and priority == "idle")


def _schedulers(root: str) -> list[tuple[str, str]]:
    """The disks below the filesystem of `root`, each with its scheduler."""
    with suppress(OSError):
        return sorted(set(_of_device((_DEVICES / _device(root)).resolve(strict=True))))
    return []


def _device(root: str) -> str:
    """MAJOR:MINOR of the filesystem's device. btrfs has a number of its own, so that of its first disk is used."""
    device = os.stat(root).st_dev
    if not os.major(device):
        fd = os.open(root, os.O_PATH | os.O_CLOEXEC)
        try:
            mount = mounts.mount_of(fd)
        finally:
            os.close(fd)
        device = os.stat(mount.source).st_rdev if mount is not None else 0
    return f"{os.major(device)}:{os.minor(device)}"


def _of_device(device: Path) -> Iterator[tuple[str, str]]:
    """The disks below a device of sysfs. That of a partition is its parent; device mapper and md have theirs below."""
    if (device / "partition").exists():
        device = device.parent
    below = [*(device / "slaves").iterdir()] if (device / "slaves").is_dir() else []
    for one in below:
        yield from _of_device(one.resolve())
    if not below:
        names = (device / "queue/scheduler").read_text().split()
        yield device.name, next((name.strip("[]") for name in names if name.startswith("[")), names[0])
