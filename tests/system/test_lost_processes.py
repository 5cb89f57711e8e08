"""Processes that die or are told to end at any time: what was accepted is finished by others."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.fixtures.filesystems import Fresh
from tests.fixtures.processes import StartWorker
from tests.support.guests import MIB, make_guest, make_sparse_file
from tests.support.tree import snapshot
from tests.system.books import check_books
from tests.system.running import SMALL_LIMITS, StartSystem, System, send, spin_until, stopped_in_the_middle
from tests.system.scheduler import UNACKED, Scheduler
from tests.system.staging import StagingView


def test_child_killed_in_mid_chunk_costs_nothing_but_time(
    system: System, scheduler: Scheduler, large_source: Path, place: Path
) -> None:
    # Given a fork that stands still, half done, with a chunk in work
    sent = scheduler.send({"source": str(large_source), "destination": str(place / "b")}, "killed-once")
    staging = StagingView(place, "killed-once")
    with stopped_in_the_middle(system.worker, staging) as children:
        # When all who work on it die
        send(children, signal.SIGKILL)

    # Then another child does their chunks again
    result = scheduler.wait(sent)
    assert result["status"] == "succeeded"
    check_books(result, scheduler.files("killed-once"))
    assert snapshot(place / "b") == snapshot(large_source)
    system.assert_left_nothing_in(place)


def test_children_killed_again_and_again_at_any_moment_cost_nothing_but_time(
    system: System, scheduler: Scheduler, large_source: Path, place: Path, fresh: Fresh
) -> None:
    directory = fresh("xfs")
    make_guest(directory / "a")
    large = scheduler.send({"source": str(large_source), "destination": str(place / "b")}, "killed-often")
    small = {
        n: scheduler.send({"source": str(directory / "a"), "destination": str(directory / f"b-{n}")}) for n in range(5)
    }
    for _ in range(6):
        time.sleep(0.15)
        send(system.worker.children[:1], signal.SIGKILL)

    result = scheduler.wait(large)
    assert result["status"] == "succeeded"
    check_books(result, scheduler.files("killed-often"))
    assert snapshot(place / "b") == snapshot(large_source)
    for n, sent in small.items():
        assert scheduler.wait(sent)["destination"] == str(directory / f"b-{n}")
    system.assert_left_nothing_in(place, directory)


def test_child_killed_in_a_fork_of_one_task_leaves_it_to_another(start_system: StartSystem, fresh: Fresh) -> None:
    # Given a fork that is cloned where it is planned, and takes a while
    system = start_system({"FORKVM_INLINE_FILES": "100000", "FORKVM_INLINE_BYTES": str(1 << 40)})
    scheduler = system.scheduler
    directory = fresh("xfs_noreflink")
    source = directory / "a"
    source.mkdir()
    make_sparse_file(source / "disk.raw", 256 * MIB, 200 * MIB)
    sent = scheduler.send({"source": str(source), "destination": str(directory / "b")}, "inline")
    staging = StagingView(directory, "inline")

    # When
    owner = spin_until(lambda: staging.owner() if staging.journal() else None, "the process that clones")
    send([owner], signal.SIGKILL)

    # Then
    result = scheduler.wait(sent)
    assert (result["status"], result["chunks"]) == ("succeeded", 1)
    assert snapshot(directory / "b") == snapshot(source)
    check_books(result, scheduler.files("inline"))
    assert "signal 9 (SIGKILL)" in system.worker.output()
    system.assert_left_nothing_in(directory)


def test_child_killed_once_while_it_finishes_leaves_it_to_another(start_system: StartSystem, fresh: Fresh) -> None:
    system = start_system({"FORKVM_INLINE_FILES": "0"})
    directory = fresh("xfs")
    source = directory / "a"
    source.mkdir()
    (source / "state").write_text("paused")
    os.link(source / "state", source / "state.again")
    (source / "other").write_text("paused")
    for n in range(4000):
        (source / f"d{n}").mkdir()
    staging = StagingView(directory, "finish-once")

    def finisher() -> int | None:
        return staging.owner() if staging.phase == "cloning" and len(staging.done()) == staging.chunks else None

    sent = system.scheduler.send({"source": str(source), "destination": str(directory / "b")}, "finish-once")
    send([spin_until(finisher, "the process that finishes")], signal.SIGKILL)

    result = system.scheduler.wait(sent)
    assert result["files"]["directories"] == 4000
    check_books(result, system.scheduler.files("finish-once"))
    assert snapshot(directory / "b") == snapshot(source)
    system.assert_left_nothing_in(directory)


@pytest.mark.parametrize("moment", ["planning", "half done"])
def test_warm_shutdown_with_work_in_flight_hands_the_rest_to_the_next_worker(
    start_system: StartSystem,
    start_worker: StartWorker,
    mounts: Path,
    large_source: Path,
    place: Path,
    fresh: Fresh,
    moment: str,
) -> None:
    # Given
    system = start_system()
    scheduler = system.scheduler
    directory = fresh("xfs")
    make_guest(directory / "a")
    sent = scheduler.send({"source": str(large_source), "destination": str(place / "b")}, "shutdown")
    small = [
        scheduler.send({"source": str(directory / "a"), "destination": str(directory / f"b-{n}")}) for n in range(10)
    ]
    staging = StagingView(place, "shutdown")
    if moment == "planning":
        spin_until(lambda: staging.phase == "planning", moment)
    else:
        spin_until(lambda: staging.is_in_the_middle(), moment)

    # When
    system.worker.term()
    status = system.worker.wait()

    # Then it ended by itself, and holds nothing any more
    assert status == 0
    assert scheduler.messages()[UNACKED] == 0
    assert not (place / "b").exists()
    assert scheduler.results.result("shutdown") is None

    # and the next worker ends what it left, long before a visibility timeout
    start_worker(mounts, env=SMALL_LIMITS)
    result = scheduler.wait(sent)
    check_books(result, scheduler.files("shutdown"))
    assert snapshot(place / "b") == snapshot(large_source)
    assert all(scheduler.wait(one)["status"] == "succeeded" for one in small)
    system.assert_left_nothing_in(place, directory)


def test_jobs_of_a_worker_that_died_with_its_machine_are_done_by_the_next_within_seconds(
    start_system: StartSystem, start_worker: StartWorker, mounts: Path, large_source: Path, place: Path
) -> None:
    # Given
    limits = {"FORKVM_VISIBILITY_TIMEOUT": "5"}
    system = start_system(limits)
    scheduler = system.scheduler
    sent = scheduler.send({"source": str(large_source), "destination": str(place / "b")}, "power-loss")
    spin_until(lambda: StagingView(place, "power-loss").is_in_the_middle(), "a fork that is half done")

    # When
    system.worker.kill()
    assert scheduler.messages()[UNACKED] > 0
    time.sleep(5.2)
    start_worker(mounts, env=SMALL_LIMITS | limits)

    # Then
    result = scheduler.wait(sent)
    check_books(result, scheduler.files("power-loss"))
    assert snapshot(place / "b") == snapshot(large_source)
    system.assert_left_nothing_in(place)


def test_fork_of_a_stopped_child_is_not_published_before_it_wakes_and_then_is_whole(
    system: System, scheduler: Scheduler, large_source: Path, place: Path
) -> None:
    """While it sleeps it holds its chunk, and may write the moment it wakes."""
    # Given a child that was stopped in mid-chunk
    sent = scheduler.send({"source": str(large_source), "destination": str(place / "b")}, "sleeper")
    staging = StagingView(place, "sleeper")
    chunk, sleeper = spin_until(lambda: _stop_one(staging), "a child in mid-chunk")
    try:
        # When all else is done
        spin_until(lambda: len(staging.done()) == staging.chunks - 1, "all other chunks")
        time.sleep(1.5)

        # Then
        assert not (place / "b").exists()
        assert chunk not in staging.done()
        assert not sent.ready()
    finally:
        send([sleeper], signal.SIGCONT)
    result = scheduler.wait(sent)
    check_books(result, scheduler.files("sleeper"))
    assert snapshot(place / "b") == snapshot(large_source)
    system.assert_left_nothing_in(place)


def _stop_one(staging: StagingView) -> tuple[int, int] | None:
    """Stops a child while it holds a chunk that is not done, when the fork is planned: (chunk, pid)."""
    if staging.phase != "cloning":
        return None
    for chunk in staging.begun() - staging.done():
        pid = staging.worker_of(chunk)
        if pid is not None:
            send([pid], signal.SIGSTOP)
            if chunk not in staging.done() and staging.worker_of(chunk) == pid:
                return chunk, pid
            send([pid], signal.SIGCONT)
    return None
