"""The checks of a root's filesystem and mount that need no write."""

from __future__ import annotations

import os
from collections.abc import Iterator

from tasks.copier.kernel import mounts, syscalls, xfs
from worker.checks.check import Check
from worker.checks.copy_on_write import possible_faults

#: mkfs.xfs makes no smaller log since xfsprogs 5.15, except on filesystems below 300 MiB.
_LOG_BYTES = 64 << 20
#: Options that make a fork slow, or an outage an error; see mount(8) and nfs(5).
_BAD_OPTIONS = {
    "sync": "each write waits for the disk",
    "dirsync": "each new file waits for the disk",
    "wsync": "each new file waits for the disk",
    "soft": "an outage of the server becomes an I/O error",
}


def filesystem_checks(subject: str, fd: int) -> Iterator[Check]:
    """Check the mount of the open root `fd`, and what XFS says of itself. Raises OSError."""
    yield _mount(subject, fd)
    if syscalls.filesystem_type(fd) == syscalls.XFS:
        found = xfs.geometry(fd)
        yield _log(subject, found)
        if found.has_reflink:
            yield _isolation(subject, found)


def _mount(subject: str, fd: int) -> Check:
    subject = f"{subject}: mount"
    mount = mounts.mount_of(fd)
    if mount is None:
        return Check(subject, "warn", "unknown: /proc is not mounted", "mount /proc")
    found = f"{mount.kind} at {mount.point} ({','.join(sorted(mount.options))})"
    bad = [f"{option}: {why}" for option, why in _BAD_OPTIONS.items() if option in mount.options]
    if bad:
        return Check(subject, "warn", f"{found}; {'; '.join(bad)}", "remove these options from the mount")
    return Check(subject, "ok", found)


def _log(subject: str, found: xfs.Geometry) -> Check:
    subject, size = f"{subject}: XFS log", f"{found.log_bytes / (1 << 20):.0f} MiB"
    if found.log_bytes < _LOG_BYTES:
        fix = "mkfs.xfs -l size=512m when you make the next one, since a log cannot grow; mount with logbsize=256k"
        return Check(subject, "warn", f"{size}: many forks at once wait for it", fix)
    return Check(subject, "ok", size)


def _isolation(subject: str, found: xfs.Geometry) -> Check:
    subject, release = f"{subject}: copy-on-write", os.uname().release
    faults = possible_faults(release, has_exchange=found.has_exchange)
    if not faults:
        return Check(subject, "ok", f"no known fault of isolation in Linux {release}")
    named = "; ".join(f"{fault.cve} ({fault.what})" for fault in faults)
    fix = "check your vendor's security tracker: vendors backport the fix without a new version; otherwise update"
    return Check(subject, "warn", f"Linux {release} may have {named}: a write to a fork can change its source", fix)
