"""Directories that one process of a test run fills and all its processes use.

pytest-xdist runs session fixtures once in each of its processes: too often for those that take most of a minute.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The directory `name` of the test run, which `make` was given empty and has filled, in this or another process."""
    of_process = factory.getbasetemp()
    of_run = of_process.parent if "PYTEST_XDIST_WORKER" in os.environ else of_process
    directory, made = of_run / name, of_run / f"{name}.made"
    with (of_run / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            shutil.rmtree(directory, ignore_errors=True)  # left by a process that failed to fill it
            directory.mkdir()
            make(directory)
            made.touch()
    return directory
