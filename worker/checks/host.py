"""What `forkvm doctor` finds on this host: the kernel, the limits, and what each root can do."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

from tasks.copier.errors import errno_name
from tasks.copier.kernel import syscalls
from tasks.copier.staging.gc import silent_stagings
from tasks.copier.staging.self_test import Support, probe_filesystem
from worker.checks.shared_filesystems import REMEDY, shared_directories, try_locks

Verdict = Literal["ok", "warn", "bad"]

#: Open files that a process may want: a worker's own, and those of a chunk or a batch of a campaign.
_OPEN_FILES = 1024
#: Less than this share of a whole is little.
LITTLE = 0.05
#: Staging in which nothing was done for so many seconds is worth a look.
_SILENT_SECONDS = 300.0
_KERNEL_MEND = "run Linux 5.6 or newer, and let the container's seccomp filter pass the call"
_RENAME_MEND = "no fork can be published here: keep guests on XFS, btrfs, ext4, tmpfs or OpenZFS 2.2"
_TYPES = {
    syscalls.XFS: "XFS",
    syscalls.BTRFS: "btrfs",
    syscalls.ZFS: "ZFS",
    syscalls.OVERLAYFS: "overlayfs",
    0xEF53: "ext4",
    0x01021994: "tmpfs",
    0x6969: "NFS",
    0xFF534D42: "CIFS",
    0xFE534D42: "SMB2",
    0x65735546: "FUSE",
    0xCA451A4E: "bcachefs",
}


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: what was found, and what mends it where it is not ok."""

    subject: str
    verdict: Verdict
    found: str
    fix: str = ""


def host_checks(roots: tuple[str, ...]) -> Iterator[Check]:
    """Look at the kernel, the limits and the roots."""
    yield _openat2()
    yield _renameat2()
    yield _open_files()
    if not roots:
        yield Check("roots", "warn", "none", "set FORKVM_ROOTS where a worker is to run: it does not start without")
    for root in roots:
        yield from _root(root)
    yield from _locks(roots)


def _openat2() -> Check:
    try:
        fd = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.close(syscalls.openat2(fd, ".", os.O_PATH | os.O_DIRECTORY, syscalls.RESOLVE_BENEATH))
        finally:
            os.close(fd)
    except OSError as error:
        return Check("kernel: openat2", "bad", _said(error), _KERNEL_MEND)
    return Check("kernel: openat2", "ok", f"works (Linux {os.uname().release})")


def _renameat2() -> Check:
    """Asked for something that is not there: a kernel that knows the call looks for it."""
    try:
        syscalls.rename_noreplace(-1, "", -1, "")
    except FileNotFoundError:
        return Check("kernel: renameat2", "ok", "works")
    except OSError as error:
        return Check("kernel: renameat2", "bad", _said(error), _KERNEL_MEND)
    raise AssertionError("it renamed nothing to nothing")


def _open_files() -> Check:
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if soft == resource.RLIM_INFINITY:
        return Check("limit: open files", "ok", "unlimited")
    if soft < _OPEN_FILES:
        fix = f"ulimit -n {_OPEN_FILES}, or LimitNOFILE={_OPEN_FILES} in the worker's unit"
        return Check("limit: open files", "warn", f"{soft} a process", fix)
    return Check("limit: open files", "ok", f"{soft} a process")


def _root(root: str) -> Iterator[Check]:
    subject = f"root {root}"
    try:
        fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        yield Check(subject, "bad", "it does not exist", "make or mount it, or take it out of FORKVM_ROOTS")
        return
    except NotADirectoryError:
        yield Check(subject, "bad", "it is no directory", "name a directory in FORKVM_ROOTS")
        return
    except OSError as error:
        yield Check(subject, "bad", _said(error), f"let uid {os.geteuid()} read it, or take it out of FORKVM_ROOTS")
        return
    try:
        yield from _opened_root(subject, fd)
    except OSError as error:
        yield Check(subject, "bad", _said(error), "look at its filesystem: the kernel's log may tell more")
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
    yield _staging(subject, fd)
    yield from _room(subject, fd)


def _not_writable(subject: str, kind: str, error: OSError) -> Check:
    unknown = "; reflink not tried"
    if isinstance(error, PermissionError):
        fix = f"let uid {os.geteuid()} write there, unless all forks go into directories below that it may write to"
        return Check(subject, "warn", f"{kind}, not writable for uid {os.geteuid()}{unknown}", fix)
    if error.errno == errno.EROFS:
        fix = "mount it for writing, unless it holds sources only"
        return Check(subject, "warn", f"{kind}, read-only{unknown}", fix)
    return Check(subject, "bad", f"{kind}, nothing can be made there: {_said(error)}{unknown}", "make it writable")


def _publishing(subject: str, kind: str, support: Support) -> Check:
    if support.rename_error is not None:
        found = f"{kind}, refuses RENAME_NOREPLACE: {_said(support.rename_error)}"
        return Check(subject, "bad", found, _RENAME_MEND)
    return Check(subject, "ok", f"{kind}, writable; RENAME_NOREPLACE works")


def _reflink(subject: str, kind: str, support: Support) -> Check:
    if support.refusal is None:
        return Check(f"{subject}: reflink", "ok", "works")
    fix = "keep guests on XFS (mkfs.xfs -m reflink=1), btrfs, or OpenZFS from 2.3"
    return Check(f"{subject}: reflink", "warn", f"refused ({support.refusal.reason}): all bytes are copied", fix)


def _staging(subject: str, fd: int) -> Check:
    count = silent_stagings(fd, _SILENT_SECONDS)
    if count:
        found = f"{count} right in it without a sign of life for {_SILENT_SECONDS / 60:.0f} minutes"
        return Check(f"{subject}: staging", "warn", found, "forkvm gc removes what is abandoned, at any depth")
    return Check(f"{subject}: staging", "ok", "none right in it that looks abandoned")


def _room(subject: str, fd: int) -> Iterator[Check]:
    status = os.fstatvfs(fd)
    # btrfs counts no inodes.
    for what, free, total in (("space", status.f_bavail, status.f_blocks), ("inodes", status.f_favail, status.f_files)):
        if total:
            share = free / total
            found = f"{share:.0%} free"
            little = share < LITTLE
            yield Check(f"{subject}: {what}", "warn" if little else "ok", found, "remove what is not needed" * little)


def _locks(roots: tuple[str, ...]) -> Iterator[Check]:
    """Whether hosts that use one filesystem share its locks; nothing where no other host can use it."""
    for path in shared_directories(roots):
        with ExitStack() as held:
            locks = try_locks(path, held)
        subject = f"locks in {path}"
        if locks.shared:
            yield Check(subject, "ok", locks.found)
        elif locks.shared is False:
            yield Check(subject, "bad", locks.found, REMEDY)
        else:
            remedy = "run doctor again while a worker of another host runs, or have one host serve this domain"
            yield Check(subject, "warn", locks.found, remedy)


def _said(error: OSError) -> str:
    return f"{errno_name(error.errno or 0)}: {error.strerror}"
