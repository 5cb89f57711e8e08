"""A pool child that is killed or stopped, at every point of a fork."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.faults.fault_points import FaultPoints
from tests.faults.paused_forks import (
    CHILDREN,
    Guests,
    PausedFork,
    StartArmedWorker,
    assert_served_and_clean,
    resume,
    start_paused_forks,
)
from tests.fixtures.processes import wait_until
from tests.support.extents import fiemap
from tests.support.system.result_checks import identity
from tests.support.system.systems import System, send
from tests.support.tree import snapshot


def test_child_killed_at_any_point_only_delays_the_fork(
    start_armed_worker: StartArmedWorker, fault_points: FaultPoints, guests: Guests, workdir: Path
) -> None:
    system = start_armed_worker(CHILDREN)
    paused = start_paused_forks(system, fault_points, guests, workdir)

    send([one.pid for one in paused], signal.SIGKILL)

    for one in paused:
        one.wait_for_success(system.scheduler)
    assert_served_and_clean(system, guests, workdir)


def test_fork_of_a_stopped_child_is_made_by_another_and_the_stopped_one_writes_nothing_into_it(
    start_armed_worker: StartArmedWorker, fault_points: FaultPoints, guests: Guests, workdir: Path
) -> None:
    # Given a child that is stopped at each point, while its worker runs
    system = start_armed_worker(CHILDREN)
    paused = start_paused_forks(system, fault_points, guests, workdir)

    # When the other children have had time to take over the forks
    for one in paused:
        one.wait_for_success(system.scheduler, 60)
    system.scheduler.wait_quiet()
    published = {one: _state_of(system, one) for one in paused}

    # Then the stopped children change nothing when they continue: no byte, no time, no extent, no result
    resume(paused)
    wait_until(
        lambda: not any(_has_staging_open(one.pid) for one in paused), "the end of the work of the continued children"
    )
    assert_served_and_clean(system, guests, workdir)
    for one in paused:
        assert _state_of(system, one) == published[one], one.point
        assert system.scheduler.results.states.get(one.fork_id)["status"] == "SUCCESS"


def test_child_that_exceeds_the_time_limit_is_killed_and_its_work_done_by_another(
    start_armed_worker: StartArmedWorker, fault_points: FaultPoints, guests: Guests, workdir: Path
) -> None:
    system = start_armed_worker(CHILDREN, {"FORKVM_TASK_TIME_LIMIT": "4", "FORKVM_VISIBILITY_TIMEOUT": "600"})
    paused = start_paused_forks(system, fault_points, guests, workdir)

    for one in paused:  # no lease expires, and no sweep runs, within this time
        one.wait_for_success(system.scheduler, 90)

    assert "took more than 4 s" in system.worker.output()
    assert_served_and_clean(system, guests, workdir)


def test_staging_of_a_child_that_hangs_after_the_result_is_removed_even_if_another_returned_the_result(
    start_armed_worker: StartArmedWorker, fault_points: FaultPoints, guests: Guests, workdir: Path
) -> None:
    # Given a fork that a second delivery found complete while the process that made it was stopped
    system = start_armed_worker(4, {"FORKVM_TASK_TIME_LIMIT": "12", "FORKVM_VISIBILITY_TIMEOUT": "600"})
    [one] = start_paused_forks(system, fault_points, guests, workdir, ["result stored"])
    system.scheduler.send({"source": str(one.source), "destination": str(one.destination)}, one.fork_id)
    one.wait_for_success(system.scheduler)
    assert "took more than" not in system.worker.output()

    # When that process is killed
    wait_until(lambda: "took more than 12 s" in system.worker.output(), "the end of the process")

    # Then
    assert_served_and_clean(system, guests, workdir)


def _state_of(system: System, one: PausedFork) -> tuple[Any, ...]:
    """Everything of a fork that a late writer could change: inodes, times, contents, positions of extents, results."""
    root = one.destination
    extents = {path: fiemap(path) for path in root.rglob("*") if path.is_file()}
    results = system.scheduler.results.final.fork(one.fork_id), system.scheduler.files(one.fork_id)
    return identity(root), snapshot(root), extents, *results


def _has_staging_open(pid: int) -> bool:
    """Whether a process has a file of a staging directory open, even if the file has been removed."""
    with suppress(FileNotFoundError):
        return any(".forkvm-" in os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir())
    return False
