"""How many CPUs this process may use: its affinity, bounded by the CPU quotas of its control groups.

A container sees all CPUs of its host. `docker run --cpus 2` and a Kubernetes limit set a quota of a control group
(cgroup); `--cpuset-cpus` and `taskset` set the affinity. Sources: cgroups(7), proc_pid_mountinfo(5) and, in the Linux
documentation, admin-guide/cgroup-v2.rst (cpu.max) and scheduler/sched-bwc.rst (version 1).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def available_cpus() -> int:
    """The number of CPUs that this process may use, at least 1. Without /proc, only the affinity counts."""
    affinity = len(os.sched_getaffinity(0))
    try:
        cgroups, mounts = Path("/proc/self/cgroup").read_text(), Path("/proc/self/mountinfo").read_text()
    except OSError:
        return affinity
    return cpus_within(affinity, cpu_quotas(cgroups, mounts))


def cpus_within(affinity: int, quotas: list[float]) -> int:
    """The smallest of `affinity` and `quotas`, rounded up: one process alone cannot use a quota of 1.5 CPUs."""
    return max(1, math.ceil(min([affinity, *quotas])))


def cpu_quotas(cgroups: str, mounts: str) -> list[float]:
    """The quotas of a process's cgroups and of their parents, in CPUs.

    `cgroups` is the text of /proc/PID/cgroup, `mounts` that of /proc/PID/mountinfo. Groups without a quota and
    unreadable ones are skipped.
    """
    found = []
    for directory in _directories(cgroups, mounts):
        quota = _quota_v2(directory) or _quota_v1(directory)
        if quota is not None:
            found.append(quota)
    return found


def _directories(cgroups: str, mounts: str) -> Iterator[Path]:
    """The directories of the CPU cgroups in each hierarchy, from the process's own up to the mount point."""
    mounted = list(_cpu_mounts(mounts))
    for line in cgroups.splitlines():
        _, controllers, path = line.split(":", 2)
        for kind, root, point in mounted:
            if (kind == "cgroup2") != (controllers == "") or (controllers and "cpu" not in controllers.split(",")):
                continue
            # In a container, the root of the mount may be its own group, named by its path on the host.
            group = PurePosixPath(path)
            inner = group.relative_to(root) if group.is_relative_to(root) else PurePosixPath()
            directory = Path(point, inner)
            yield directory
            yield from (above for above in directory.parents if above.is_relative_to(point))


def _cpu_mounts(mounts: str) -> Iterator[tuple[str, str, str]]:
    """(type, root, mount point) of each mount of the unified hierarchy (v2) and of the cpu controller (v1)."""
    for line in mounts.splitlines():
        fields, _, rest = line.partition(" - ")
        kind, _, options = rest.split(" ", 2)
        if kind == "cgroup2" or (kind == "cgroup" and "cpu" in options.split(",")):
            root, point = (_unescaped(field) for field in fields.split()[3:5])
            yield kind, root, point


def _unescaped(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), field)


def _quota_v2(directory: Path) -> float | None:
    try:
        quota, period = (directory / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _quota_v1(directory: Path) -> float | None:
    try:
        quota = int((directory / "cpu.cfs_quota_us").read_text())
        return None if quota < 0 else quota / int((directory / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError, ZeroDivisionError):
        return None
