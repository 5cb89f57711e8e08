"""One paused fork for every fault point, so that one fault hits all of them at once."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tests.faults.fault_points import FAULT_POINTS, INLINE, SMALL, FaultPoints
from tests.fixtures.processes import wait_until
from tests.support.system.result_checks import check_file_results, check_fork_result
from tests.support.system.scheduler import TIMEOUT, Scheduler
from tests.support.system.staging_view import leftovers
from tests.support.system.systems import System, send
from tests.support.tree import snapshot

#: One child for each paused fork, and some for all other work, redelivered messages included.
CHILDREN = len(FAULT_POINTS) + 4


class StartArmedWorker(Protocol):
    def __call__(self, concurrency: int = 2, env: Mapping[str, str] | None = None) -> System: ...


@dataclass(frozen=True)
class Guests:
    """A guest whose fork takes six chunks, and one whose fork is made in one task."""

    large: Path
    small: Path

    def at(self, point: str) -> Path:
        """The guest whose fork has this fault point."""
        return self.small if point == INLINE or point.startswith(SMALL) else self.large


@dataclass(frozen=True)
class PausedFork:
    """A fork, the point at which it is paused, and the pid of the paused process."""

    point: str
    fork_id: str
    source: Path
    destination: Path
    pid: int

    def wait_for_success(self, scheduler: Scheduler, timeout: float = TIMEOUT, *, emptied: bool = False) -> None:
        """Wait until the fork has succeeded and check its files and results. Polls Redis, which may restart meanwhile.

        `emptied`: Redis lost its data, so there are no FileResults to check.
        """
        what = f"the result of the fork paused at {self.point}"
        wait_until(
            lambda: scheduler.results.states.get(self.fork_id)["status"] in ("SUCCESS", "FAILURE"), what, timeout
        )
        result = scheduler.results.final.fork(self.fork_id)
        assert result is not None, what
        check_fork_result(result)
        assert result["error"] is None, f"paused at {self.point}: {result['error']}"
        assert scheduler.results.states.get(self.fork_id)["status"] == "SUCCESS"
        if not emptied:
            check_file_results(result, scheduler.files(self.fork_id))
        assert snapshot(self.destination) == snapshot(self.source)


def id_at(point: str) -> str:
    """The id of the fork that has a fault at this point."""
    return point.replace(",", "").replace(" ", "-")


def start_paused_forks(
    system: System, fault_points: FaultPoints, guests: Guests, workdir: Path, which: Iterable[str] = FAULT_POINTS
) -> list[PausedFork]:
    """Start a fork for each point, and return when each is paused there."""
    forks = []
    for point in which:
        fork_id, source = id_at(point), guests.at(point)
        forks.append((point, fork_id, source, workdir / fork_id))
        fault_points.arm(fork_id, point, "stop")
        system.scheduler.send({"source": str(source), "destination": str(workdir / fork_id)}, fork_id)
    for point, fork_id, *_ in forks:
        wait_until(lambda m=point, f=fork_id: bool(fault_points.reached(f, m)), f"a process at {point}")  # type: ignore[misc]
    return [PausedFork(*fork, pid=fault_points.reached(fork[1], fork[0])[0]) for fork in forks]


def resume(paused: Iterable[PausedFork]) -> None:
    """Send SIGCONT to the paused processes."""
    send([one.pid for one in paused], signal.SIGCONT)


def assert_served_and_clean(system: System, guests: Guests, workdir: Path, name: str = "next") -> None:
    """The worker serves another fork; afterwards no message is in flight and no staging is left."""
    system.scheduler.send({"source": str(guests.small), "destination": str(workdir / name)}, name)
    PausedFork("no fault", name, guests.small, workdir / name, 0).wait_for_success(system.scheduler)
    system.scheduler.wait_quiet()
    wait_until(lambda: not leftovers(workdir), f"the removal of all staging: {leftovers(workdir)}")
