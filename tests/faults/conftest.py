"""Systems whose workers stop or are killed at armed points of a fork."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.faults.fault_points import FaultPoints, directory_of
from tests.faults.paused_forks import Guests, StartArmedWorker
from tests.fixtures.filesystems import Fresh, fresh_directory
from tests.fixtures.processes import StartWorker
from tests.support.guests import MIB, make_sparse_file
from tests.support.system.scheduler import Scheduler
from tests.support.system.systems import System

#: Small forks are made in chunks. The messages of a killed or stopped process are delivered again after 5 s.
LIMITS = {
    "FORKVM_INLINE_FILES": "4",
    "FORKVM_CHUNK_FILES": "8",
    "FORKVM_VISIBILITY_TIMEOUT": "5",
}


@pytest.fixture
def start_armed_worker(own_scheduler: Scheduler, start_worker: StartWorker, mounts: Path) -> StartArmedWorker:
    """Starts a worker whose children stop or kill themselves at armed points (`fault_points`)."""

    def start(concurrency: int = 2, env: Mapping[str, str] | None = None) -> System:
        env = LIMITS | dict(env or {})
        worker = start_worker(mounts, concurrency, include="tests.faults.armed_worker", env=env)
        return System(own_scheduler.server, worker, own_scheduler)

    return start


@pytest.fixture
def fault_points(own_scheduler: Scheduler) -> FaultPoints:
    return FaultPoints(directory_of(own_scheduler.server.broker_url))


@pytest.fixture(scope="session")
def guests(xfs: Path) -> Iterator[Guests]:
    """A guest of six chunks and one of a single task, on XFS with reflinks."""
    with fresh_directory(xfs) as parent:
        large, small = parent / "large", parent / "small"
        for n in range(6):
            (large / f"layer-{n}").mkdir(parents=True)
            for m in range(8):
                (large / f"layer-{n}" / f"block-{m}").write_bytes(b"%d/%d" % (n, m) * 3000)
        make_sparse_file(large / "disk.raw", 4 * MIB, MIB, seed=3)
        small.mkdir()
        make_sparse_file(small / "disk.raw", 4 * MIB, MIB, seed=4)
        (small / "state").write_text("paused")
        yield Guests(large, small)


@pytest.fixture
def workdir(fresh: Fresh) -> Path:
    """The directory of the destinations."""
    return fresh("xfs")
