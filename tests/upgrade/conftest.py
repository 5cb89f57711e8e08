"""Workers of both versions on one Redis."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Protocol

import pytest

from tests.fixtures.processes import StartWorker, Worker
from tests.support.made_once import made_once
from tests.upgrade import options
from tests.upgrade.earlier_version import install, script_in

Version = Literal["earlier", "this"]

#: Limits under which a few MiB are a large fork; and a message of a killed worker is delivered again after 5 s.
LIMITS = {
    "FORKVM_INLINE_FILES": "10",
    "FORKVM_INLINE_BYTES": "1048576",
    "FORKVM_CHUNK_FILES": "20",
    "FORKVM_CHUNK_BYTES": "2097152",
    "FORKVM_VISIBILITY_TIMEOUT": "5",
}


class StartVersion(Protocol):
    def __call__(self, version: Version) -> Worker: ...


@pytest.fixture(scope="session")
def earlier_forkvm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The script `forkvm` of the earlier version."""
    return options.earlier() or script_in(made_once(tmp_path_factory, "earlier", install))


@pytest.fixture
def start_version(start_worker: StartWorker, earlier_forkvm: Path, mounts: Path) -> StartVersion:
    """Starts a worker of either version, with two children."""
    programs = {"earlier": earlier_forkvm, "this": None}

    def start(version: Version) -> Worker:
        return start_worker(mounts, command="forkvm", program=programs[version], env=LIMITS)

    return start
