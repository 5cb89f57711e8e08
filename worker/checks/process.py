"""The checks of this process: its user and capabilities, against what the roots hold."""

from __future__ import annotations

import os
from itertools import islice

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
#: So many entries of a root are looked at.
_MOST_ENTRIES = 1_000


def capability_check() -> Check:
    """Say as which user this process runs, and with which of the capabilities that forks can need."""
    subject = "user"
    try:
        held = _held(effective_capabilities())
    except OSError:
        return Check(subject, "warn", f"uid {os.geteuid()}; capabilities unknown: /proc is not mounted", "mount /proc")
    return Check(subject, "ok", f"uid {os.geteuid()}, {', '.join(sorted(held)) or 'no capability'}")


def owner_check(subject: str, fd: int) -> Check:
    """Compare the owners of the entries in the open root `fd` with the rights of this process. Raises OSError."""
    subject, own = f"{subject}: owners", os.geteuid()
    with os.scandir(fd) as entries:
        owners = [entry.stat(follow_symlinks=False).st_uid for entry in islice(entries, _MOST_ENTRIES)]
    others = sorted({owner for owner in owners if owner != own})
    if not others:
        return Check(subject, "ok", f"its {len(owners)} entries belong to uid {own}")
    count = sum(owner != own for owner in owners)
    found = f"{count} of {len(owners)} entries belong to other users (first uid {others[0]})"
    missing = _missing()
    if missing:
        fix = f"run as their owner, or give the worker {', '.join(missing)}; see SECURITY.md"
        return Check(subject, "warn", f"{found}: their forks lose owners, or fail", fix)
    return Check(subject, "ok", f"{found}; the worker may preserve them")


def _missing() -> list[str]:
    """The capabilities that this process lacks to fork files of other owners; all without /proc."""
    try:
        held = _held(effective_capabilities())
    except OSError:
        held = set()
    held |= {name for name, other in _IMPLIED.items() if other in held}
    return [name for name in _CAPABILITIES if name not in held]


def _held(effective: int) -> set[str]:
    return {name for name, number in _CAPABILITIES.items() if effective & 1 << number}
