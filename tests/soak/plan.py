"""The duration of a soak, and its seed."""

from __future__ import annotations

import os

SECONDS, SEED = "SOAK_SECONDS", "SOAK_SEED"
#: In a run of all tests.
_DEFAULT_SECONDS, _DEFAULT_SEED = 30, 1


def seconds() -> int:
    return int(os.environ.get(SECONDS, _DEFAULT_SECONDS))


def seed() -> int:
    return int(os.environ.get(SEED, _DEFAULT_SEED))
