"""A fork for every moment, each of them standing still there: so one fault strikes at all moments at once."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tests.faults.fault_points import INLINE, MOMENTS, Moments
from tests.fixtures.processes import wait_until
from tests.support.system.result_checks import check_books, check_fork_result
from tests.support.system.scheduler import PATIENCE, Scheduler
from tests.support.system.staging_view import leftovers
from tests.support.system.systems import System, send
from tests.support.tree import snapshot

#: One for each moment to stand still at, and some to do all else: also what comes again while the others stand.
CHILDREN = len(MOMENTS) + 4


class StartStruck(Protocol):
    def __call__(self, concurrency: int = 2, env: Mapping[str, str] | None = None) -> System: ...


@dataclass(frozen=True)
class Guests:
    """A guest whose fork takes six chunks, and one whose fork is made in one task."""

    large: Path
    small: Path


@dataclass(frozen=True)
class Struck:
    """One fork, the moment that is armed for it, and the process that came there."""

    moment: str
    fork_id: str
    source: Path
    destination: Path
    pid: int

    def wait_for_success(self, scheduler: Scheduler, timeout: float = PATIENCE, *, emptied: bool = False) -> None:
        """Waits for its true result: the fork stands, whole, and its books balance. Asks Redis, which may restart.

        `emptied`: Redis was, and what it had of the FileResults is gone.
        """
        what = f"the result of the fork struck at {self.moment}"
        wait_until(
            lambda: scheduler.results.states.get(self.fork_id)["status"] in ("SUCCESS", "FAILURE"), what, timeout
        )
        result = scheduler.results.final.fork(self.fork_id)
        assert result is not None, what
        check_fork_result(result)
        assert result["error"] is None, f"struck at {self.moment}: {result['error']}"
        assert scheduler.results.states.get(self.fork_id)["status"] == "SUCCESS"
        if not emptied:
            check_books(result, scheduler.files(self.fork_id))
        assert snapshot(self.destination) == snapshot(self.source)


def stand_at(
    system: System, moments: Moments, guests: Guests, place: Path, which: Iterable[str] = MOMENTS
) -> list[Struck]:
    """Begins a fork for each moment, and returns when each has come to it and stands still."""
    forks = []
    for moment in which:
        fork_id = moment.replace(" ", "-")
        source = guests.small if moment == INLINE else guests.large
        forks.append((moment, fork_id, source, place / fork_id))
        moments.arm(fork_id, moment, "stop")
        system.scheduler.send({"source": str(source), "destination": str(place / fork_id)}, fork_id)
    for moment, fork_id, *_ in forks:
        wait_until(lambda m=moment, f=fork_id: bool(moments.reached(f, m)), f"a process at {moment}")  # type: ignore[misc]
    return [Struck(*fork, pid=moments.reached(fork[1], fork[0])[0]) for fork in forks]


def go_on(struck: Iterable[Struck]) -> None:
    """Let those who stand still go on."""
    send([one.pid for one in struck], signal.SIGCONT)


def assert_served_and_clean(system: System, guests: Guests, place: Path, name: str = "next") -> None:
    """The worker serves another fork, nothing is on its way any more, and no staging is left."""
    system.scheduler.send({"source": str(guests.small), "destination": str(place / name)}, name)
    Struck("no fault", name, guests.small, place / name, 0).wait_for_success(system.scheduler)
    system.scheduler.wait_quiet()
    wait_until(lambda: not leftovers(place), f"the end of all staging: {leftovers(place)}")
