"""The checks of this process: its user and capabilities, against what the roots hold."""

from __future__ import annotations

import os
import stat
import time
from collections import deque
from contextlib import suppress

from tasks.copier.kernel import syscalls
from tasks.copier.kernel.processes import effective_capabilities
from worker.checks.check import Check

#: <linux/capability.h>: what SECURITY.md lists as needed to fork files of other owners.
_CAPABILITIES = {
    "CAP_CHOWN": 0,
    "CAP_DAC_OVERRIDE": 1,
    "CAP_DAC_READ_SEARCH": 2,
    "CAP_FOWNER": 3,
    "CAP_FSETID": 4,
}
#: CAP_DAC_OVERRIDE includes CAP_DAC_READ_SEARCH.
_IMPLIED = {"CAP_DAC_READ_SEARCH": "CAP_DAC_OVERRIDE"}
#: What else SECURITY.md lists, for files with file capabilities.
_SETFCAP = {"CAP_SETFCAP": 31}
#: So much of a root is looked at: entries, levels of directories, seconds.
_MOST_ENTRIES, _MOST_LEVELS, _MOST_SECONDS = 5_000, 4, 0.25
_OPEN = os.O_RDONLY | os.O_DIRECTORY
_RESOLVE = syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_SYMLINKS | syscalls.RESOLVE_NO_XDEV


def capability_check() -> Check:
    """Say as which user this process runs, and with which of the capabilities that forks can need."""
    subject = "user"
    try:
        held = _held(effective_capabilities())
    except OSError:
        return Check(subject, "warn", f"uid {os.geteuid()}; capabilities unknown: /proc is not mounted", "mount /proc")
    found = f"uid {os.geteuid()}, {', '.join(sorted(held)) or 'no capability'}"
    if "CAP_CHOWN" in held and not _SETFCAP.keys() & held:  # meant to preserve what other users own
        fix = "give the worker CAP_SETFCAP, unless no file of a guest has file capabilities; see SECURITY.md"
        return Check(subject, "warn", f"{found}; without CAP_SETFCAP, forks lose file capabilities", fix)
    return Check(subject, "ok", found)


def owner_check(subject: str, fd: int) -> Check:
    """Compare the owners of the entries below the open root `fd` with the rights of this process. Raises OSError."""
    subject, own = f"{subject}: owners", os.geteuid()
    owners, are_all = _owners(fd)
    others = sorted({owner for owner in owners if owner != own})
    looked_at = "entries" if are_all else "entries that were looked at"
    if not others:
        return Check(subject, "ok", f"{'its' if are_all else 'the'} {len(owners)} {looked_at} belong to uid {own}")
    count = sum(owner != own for owner in owners)
    found = f"{count} of {len(owners)} {looked_at} belong to other users (first uid {others[0]})"
    missing = _missing()
    if missing:
        fix = f"run as their owner, or give the worker {', '.join(missing)}; see SECURITY.md"
        return Check(subject, "warn", f"{found}: their forks lose owners, or fail", fix)
    return Check(subject, "ok", f"{found}; the worker may preserve them")


def _owners(root: int) -> tuple[list[int], bool]:
    """The owners of entries below a root, from the top down, and whether these are all. Raises OSError for the root."""
    deadline = time.monotonic() + _MOST_SECONDS
    owners: list[int] = []
    are_all, directories = True, deque([(".", 1)])
    while directories:
        path, level = directories.popleft()
        try:
            fd = syscalls.openat2(root, path, _OPEN, _RESOLVE)
        except OSError:  # another user's, another filesystem's, or removed
            if path == ".":
                raise
            continue
        try:
            with os.scandir(fd) as entries:
                for entry in entries:
                    if len(owners) == _MOST_ENTRIES or time.monotonic() > deadline:
                        return owners, False
                    with suppress(FileNotFoundError):
                        status = entry.stat(follow_symlinks=False)
                        owners.append(status.st_uid)
                        if stat.S_ISDIR(status.st_mode):
                            is_last = level == _MOST_LEVELS
                            are_all = are_all and not is_last
                            directories.extend([] if is_last else [(f"{path}/{entry.name}", level + 1)])
        finally:
            os.close(fd)
    return owners, are_all


def _missing() -> list[str]:
    """The capabilities that this process lacks to fork files of other owners; all without /proc."""
    try:
        held = _held(effective_capabilities())
    except OSError:
        held = set()
    held |= {name for name, other in _IMPLIED.items() if other in held}
    return [name for name in _CAPABILITIES if name not in held]


def _held(effective: int) -> set[str]:
    return {name for name, number in (_CAPABILITIES | _SETFCAP).items() if effective & 1 << number}
