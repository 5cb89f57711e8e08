"""A task that kills its process each time, at every point: it ends after a few attempts, and others continue."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from tasks.copier.fork.chunk import MAX_TRIES
from tasks.delivery.message import MAX_LOSSES
from tests.faults.fault_points import FAULT_POINTS, PUBLISHED, FaultPoints
from tests.faults.paused_forks import Guests, PausedFork, StartArmedWorker, assert_served_and_clean, id_at
from tests.fixtures.processes import wait_until
from tests.support.system.result_checks import check_file_results, check_fork_result

#: At these points the process is killed before it can count its attempt in the staging.
UNCOUNTED = ("begin uncounted", "finish uncounted", "before the rename")


def test_a_fork_that_kills_its_process_each_time_ends_after_a_limited_number_of_attempts(
    start_armed_worker: StartArmedWorker, fault_points: FaultPoints, guests: Guests, workdir: Path
) -> None:
    # Given a fork that kills its process at every point, and other forks beside them
    system = start_armed_worker(6)
    scheduler = system.scheduler
    poisoned = []
    for point in FAULT_POINTS:
        fork_id = id_at(point)
        fault_points.arm(fork_id, point, "poison")
        poisoned.append(PausedFork(point, fork_id, guests.at(point), workdir / fork_id, 0))
    good = [PausedFork("no point", f"good-{n}", guests.large, workdir / f"good-{n}", 0) for n in range(4)]

    # When
    for fork in [*poisoned, *good]:
        scheduler.send({"source": str(fork.source), "destination": str(fork.destination)}, fork.fork_id)

    # Then the other forks are made
    for fork in good:
        fork.wait_for_success(scheduler)

    # and each of the killing forks ends: published if the point comes after that, else as a failure with nothing left
    for fork in poisoned:
        wait_until(lambda f=fork: scheduler.results.final.fork(f.fork_id) is not None, f"the end of {fork.point}", 60)  # type: ignore[misc]
        if fork.point in PUBLISHED:
            fault_points.disarm(fork.fork_id, fork.point)
            fork.wait_for_success(scheduler)
            continue
        result = scheduler.results.final.fork(fork.fork_id)
        assert result is not None
        check_fork_result(result)
        assert result["error"] is not None, fork.point
        assert result["error"]["code"] == "worker_lost", fork.point
        check_file_results(result, scheduler.files(fork.fork_id))
        assert not fork.destination.exists()
        tries = len(fault_points.reached(fork.fork_id, fork.point))
        assert 2 <= tries <= (2 * MAX_LOSSES if fork.point in UNCOUNTED else MAX_TRIES + 1), (fork.point, tries)
        state = partial(scheduler.results.states.get, fork.fork_id)
        wait_until(lambda state=state: state()["status"] == "FAILURE", f"the state of {fork}")  # type: ignore[misc]
    assert_served_and_clean(system, guests, workdir)
