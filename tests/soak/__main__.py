"""Runs the soak for a given time: `python -m tests.soak --seconds 300 --seed 7`."""

from __future__ import annotations

import argparse
import os
import secrets
import sys

import pytest

from tests.soak.plan import SECONDS, SEED

#: Seconds for the last forks and the checks.
_REST_SECONDS = 600


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=300, help="how long faults are injected (default 300)")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1_000_000), help="of all that is random")
    given = parser.parse_args()
    os.environ |= {SECONDS: str(given.seconds), SEED: str(given.seed)}
    return pytest.main(["tests/soak", "-s", "-q", "--timeout", str(given.seconds + _REST_SECONDS)])


if __name__ == "__main__":
    sys.exit(main())
