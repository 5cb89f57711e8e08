"""The checks of `forkvm doctor` on this host: the kernel, limits, and each root's filesystem."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import ExitStack

from tasks.copier.kernel import syscalls
from tasks.copier.kernel.leases import may_lease_files_of_others
from tasks.copier.staging.gc import silent_stagings
from tasks.copier.staging.self_test import Support, probe_filesystem
from worker.checks.check import LOW_SHARE, Check, text_of
from worker.checks.filesystem import filesystem_checks
from worker.checks.process import capability_check, owner_check
from worker.checks.reflink_pairs import pair_checks
from worker.checks.shared_filesystems import REMEDY, shared_directories, try_locks

#: The subject of checks of system calls without which no fork is possible.
KERNEL = "kernel"
#: Most open files of a process: a worker's own, and those of a chunk or a batch of a campaign.
_OPEN_FILES = 1024
#: Staging directories without a heartbeat for this time count as abandoned, in seconds.
_SILENT_SECONDS = 300.0
_KERNEL_FIX = "run Linux 5.6 or newer, and allow the call in the container's seccomp filter"
_RENAME_FIX = "forks cannot be published here: keep guests on XFS, btrfs, ext4, tmpfs or OpenZFS from 2.2"
_TYPES = {
    syscalls.XFS: "XFS",
    syscalls.BTRFS: "btrfs",
    syscalls.ZFS: "ZFS",
    syscalls.OVERLAYFS: "overlayfs",
    syscalls.EXT4: "ext4",
    syscalls.TMPFS: "tmpfs",
    0x6969: "NFS",
    0xFF534D42: "CIFS",
    0xFE534D42: "SMB2",
    0x65735546: "FUSE",
    0xCA451A4E: "bcachefs",
}


def host_checks(roots: tuple[str, ...]) -> Iterator[Check]:
    """Check the kernel, the limits, this process and the roots."""
    yield _openat2()
    yield _renameat2()
    yield _open_files()
    yield capability_check()
    if not roots:
        yield Check("roots", "warn", "none", "set FORKVM_ROOTS: a worker does not start without it")
    for root in roots:
        yield from _root(root)
    yield from pair_checks(roots)


def _openat2() -> Check:
    try:
        fd = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.close(syscalls.openat2(fd, ".", os.O_PATH | os.O_DIRECTORY, syscalls.RESOLVE_BENEATH))
        finally:
            os.close(fd)
    except OSError as error:
        return Check(f"{KERNEL}: openat2", "bad", text_of(error), _KERNEL_FIX)
    return Check(f"{KERNEL}: openat2", "ok", f"works (Linux {os.uname().release})")


def _renameat2() -> Check:
    """Rename a missing file: ENOENT shows that the kernel has the call."""
    try:
        syscalls.rename_noreplace(-1, "", -1, "")
    except FileNotFoundError:
        return Check(f"{KERNEL}: renameat2", "ok", "works")
    except OSError as error:
        return Check(f"{KERNEL}: renameat2", "bad", text_of(error), _KERNEL_FIX)
    raise AssertionError("renameat2 succeeded without a source")


def _open_files() -> Check:
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if soft == resource.RLIM_INFINITY:
        return Check("limit: open files", "ok", "unlimited")
    if soft < _OPEN_FILES:
        fix = f"ulimit -n {_OPEN_FILES}, or LimitNOFILE={_OPEN_FILES} in the worker's unit"
        return Check("limit: open files", "warn", f"{soft} per process", fix)
    return Check("limit: open files", "ok", f"{soft} per process")


def _root(root: str) -> Iterator[Check]:
    subject = f"root {root}"
    try:
        fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        yield Check(subject, "bad", "it does not exist", "create or mount it, or remove it from FORKVM_ROOTS")
        return
    except NotADirectoryError:
        yield Check(subject, "bad", "it is not a directory", "name a directory in FORKVM_ROOTS")
        return
    except OSError as error:
        yield Check(
            subject, "bad", text_of(error), f"allow uid {os.geteuid()} to read it, or remove it from FORKVM_ROOTS"
        )
        return
    try:
        yield from _opened_root(subject, fd)
    except OSError as error:
        yield Check(subject, "bad", text_of(error), "check its filesystem; the kernel's log may have the reason")
    finally:
        os.close(fd)


def _opened_root(subject: str, fd: int) -> Iterator[Check]:
    number = syscalls.filesystem_type(fd)
    kind = _TYPES.get(number, f"a filesystem of type {number:#x}")
    try:
        support = probe_filesystem(fd)
    except OSError as error:
        yield _not_writable(subject, kind, error)
    else:
        yield _publishing(subject, kind, support)
        yield _reflink(subject, kind, support)
        yield _leases(subject, support)
    yield from filesystem_checks(subject, fd)
    yield owner_check(subject, fd)
    yield _staging(subject, fd)
    yield from _free(subject, fd)


def _not_writable(subject: str, kind: str, error: OSError) -> Check:
    unknown = "; reflink not checked"
    if isinstance(error, PermissionError):
        fix = f"allow uid {os.geteuid()} to write to it, or to the directories below it that forks go into"
        return Check(subject, "warn", f"{kind}, not writable for uid {os.geteuid()}{unknown}", fix)
    if error.errno == errno.EROFS:
        fix = "mount it read-write, unless it holds only sources"
        return Check(subject, "warn", f"{kind}, read-only{unknown}", fix)
    return Check(subject, "bad", f"{kind}, no file can be created: {text_of(error)}{unknown}", "make it writable")


def _publishing(subject: str, kind: str, support: Support) -> Check:
    if support.rename_error is not None:
        found = f"{kind}, refuses RENAME_NOREPLACE: {text_of(support.rename_error)}"
        return Check(subject, "bad", found, _RENAME_FIX)
    return Check(subject, "ok", f"{kind}, writable; RENAME_NOREPLACE works")


def _reflink(subject: str, kind: str, support: Support) -> Check:
    if support.refusal is None:
        return Check(f"{subject}: reflink", "ok", "works")
    fix = "keep guests on XFS (mkfs.xfs -m reflink=1), btrfs, or OpenZFS from 2.3"
    return Check(f"{subject}: reflink", "warn", f"refused ({support.refusal.reason}): forks copy all data", fix)


def _leases(subject: str, support: Support) -> Check:
    """Whether requests with `source_open: refuse` are possible."""
    subject = f"{subject}: read leases"
    if support.lease_error is not None:
        fix = "keep guests on a local filesystem, or send no request with source_open=refuse"
        return Check(subject, "warn", f"refused ({text_of(support.lease_error)}): source_open=refuse fails", fix)
    if may_lease_files_of_others():
        return Check(subject, "ok", "work")
    return Check(subject, "ok", f"work for files of uid {os.geteuid()}; those of others need CAP_LEASE")


def _staging(subject: str, fd: int) -> Check:
    count = silent_stagings(fd, _SILENT_SECONDS)
    if count:
        found = f"{count} directly in it without a heartbeat for {_SILENT_SECONDS / 60:.0f} minutes"
        return Check(f"{subject}: staging", "warn", found, "run forkvm gc; it searches subdirectories too")
    return Check(f"{subject}: staging", "ok", "none directly in it looks abandoned")


def _free(subject: str, fd: int) -> Iterator[Check]:
    status = os.fstatvfs(fd)
    free_bytes = f"{status.f_bavail * status.f_frsize / (1 << 30):,.1f} GiB"
    space = ("space", free_bytes, status.f_bavail, status.f_blocks)
    inodes = ("inodes", f"{status.f_favail:,}", status.f_favail, status.f_files)
    for what, amount, free, total in (space, inodes):
        if total:  # btrfs reports 0 inodes
            low = free / total < LOW_SHARE
            found = f"{free / total:.0%} free ({amount})"
            yield Check(f"{subject}: {what}", "warn" if low else "ok", found, "remove files that are not needed" * low)


def lock_checks(roots: tuple[str, ...]) -> Iterator[Check]:
    """Check each filesystem that other hosts may use: whether they share its locks."""
    for path in shared_directories(roots):
        with ExitStack() as held:
            locks = try_locks(path, held)
        subject = f"locks in {path}"
        if locks.shared:
            yield Check(subject, "ok", locks.found)
        elif locks.shared is False:
            yield Check(subject, "bad", locks.found, REMEDY)
        else:
            remedy = "run doctor again while a worker of another host runs, or let one host serve this domain"
            yield Check(subject, "warn", locks.found, remedy)
