"""Runs the upgrade test for a given time: `python -m tests.upgrade --seconds 600 --seed 7`."""

from __future__ import annotations

import argparse
import os
import secrets
import sys

import pytest

from tests.upgrade import options

#: Seconds for the set-up and for the last jobs to end.
_REST_SECONDS = 600


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=300, help="how long workers are killed (default 300)")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1_000_000), help="seed of all random choices")
    parser.add_argument("--earlier", default="", help="script forkvm of an installation of the earlier version")
    given = parser.parse_args()
    os.environ |= {options.SECONDS: str(given.seconds), options.SEED: str(given.seed), options.EARLIER: given.earlier}
    return pytest.main(["tests/upgrade", "-s", "-q", "--timeout", str(given.seconds + _REST_SECONDS)])


if __name__ == "__main__":
    sys.exit(main())
