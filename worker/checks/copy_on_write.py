"""Kernels with known faults in the isolation of reflinked files: a write to one file changes another one.

Sources: the announcements of CVE-2026-80530 (XFSTango) and CVE-2026-64600 (RefluXFS). Vendors backport fixes without a
change of the version, so a version is a hint and no proof.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Fault(NamedTuple):
    """One fault that a kernel may have."""

    cve: str
    what: str


_TANGO = Fault("CVE-2026-80530", "XFS with reflinks and the feature `exchange`, from Linux 6.10")
_REFLUX = Fault("CVE-2026-64600", "direct I/O into reflinked files on XFS")
#: The first fixed release of each series that has one, as (major, minor, patch).
_TANGO_FIXES = ((6, 12, 105), (6, 18, 46), (7, 1, 10))
_TANGO_FROM, _TANGO_UNTIL = (6, 10), (7, 2)
#: The last release candidate of 7.2 without the fix.
_TANGO_LAST_CANDIDATE = 6
#: Fixed in Debian's 6.12.96. Nothing is known of later series.
_REFLUX_FIX = (6, 12, 96)
_RELEASE = re.compile(r"(\d+)\.(\d+)(?:\.(\d+))?(?:-rc(\d+))?")


def possible_faults(release: str, *, has_exchange: bool) -> list[Fault]:
    """The faults that a kernel of this release (uname -r) may have, for an XFS filesystem with reflinks."""
    found = _RELEASE.match(release)
    if found is None:
        return []
    version = (int(found[1]), int(found[2]), int(found[3] or 0))
    candidate = int(found[4]) if found[4] else None
    faults = [_TANGO] if has_exchange and _has_tango(version, candidate) else []
    return faults + ([_REFLUX] if version < _REFLUX_FIX else [])


def _has_tango(version: tuple[int, int, int], candidate: int | None) -> bool:
    if version[:2] == _TANGO_UNTIL:
        return candidate is not None and candidate <= _TANGO_LAST_CANDIDATE
    if not _TANGO_FROM <= version[:2] < _TANGO_UNTIL:
        return False
    return all(version[:2] != fix[:2] or version < fix for fix in _TANGO_FIXES)
