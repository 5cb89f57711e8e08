"""The options of an upgrade run, which `python -m tests.upgrade` passes in environment variables."""

from __future__ import annotations

import os
from pathlib import Path

SECONDS, SEED, EARLIER = "UPGRADE_SECONDS", "UPGRADE_SEED", "UPGRADE_EARLIER"
#: In a run of all tests.
_DEFAULT_SECONDS, _DEFAULT_SEED = 12, 1


def seconds() -> int:
    """How long workers are killed."""
    return int(os.environ.get(SECONDS, _DEFAULT_SECONDS))


def seed() -> int:
    """The seed of all random choices."""
    return int(os.environ.get(SEED, _DEFAULT_SEED))


def earlier() -> Path | None:
    """The script `forkvm` of an installation of the earlier version; None to install it."""
    given = os.environ.get(EARLIER)
    return Path(given) if given else None
