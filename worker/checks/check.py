"""The result of a check."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tasks.copier.errors import errno_name

Verdict = Literal["ok", "warn", "bad"]

#: Below this share of free space, inodes or memory, a check warns.
LOW_SHARE = 0.05


@dataclass(frozen=True)
class Check:
    """The result of one check, with a fix if it is not ok."""

    subject: str
    verdict: Verdict
    found: str
    fix: str = ""


def text_of(error: OSError) -> str:
    """The errno and the kernel's text of an error."""
    return f"{errno_name(error.errno or 0)}: {error.strerror}"
