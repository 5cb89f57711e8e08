"""Redis loses the ends of forks and delivers them again: the entry at the destination decides the result."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.filesystems import Fresh
from tests.fixtures.processes import wait_until
from tests.support.guests import make_guest
from tests.support.system.queued_campaigns import (
    assert_all_are_whole,
    forks_of,
    make_source,
    paths_of,
    request_of,
    result_of,
    send,
)
from tests.support.system.result_checks import check_file_results
from tests.support.system.scheduler import Scheduler
from tests.support.system.systems import StartSystem, System

COUNT = 300


@pytest.fixture
def workdir(fresh: Fresh) -> Path:
    return fresh("xfs")


def _save_data(scheduler: Scheduler, copy: Path) -> None:
    """Copy the data that Redis has on disk."""
    server = scheduler.server
    server.stop()
    shutil.copytree(server.socket.parent / "appendonlydir", copy)
    server.start()


def _restore_data(system: System, copy: Path) -> None:
    """Kill Redis, and start it with the copied data."""
    server = system.server
    server.kill()
    shutil.rmtree(server.socket.parent / "appendonlydir")
    shutil.copytree(copy, server.socket.parent / "appendonlydir")
    server.start()


def _wait_for_end(scheduler: Scheduler, job_id: str) -> None:
    ended = ("SUCCESS", "FAILURE", "REVOKED")
    wait_until(lambda: scheduler.results.final.get(job_id) is not None, f"the result of {job_id}", 60)
    wait_until(lambda: scheduler.results.states.get(job_id)["status"] in ended, f"the state of {job_id}")


def _result(scheduler: Scheduler, fork_id: str) -> Any:
    _wait_for_end(scheduler, fork_id)
    return scheduler.results.final.fork(fork_id)


def test_a_fork_that_redis_lost_ends_with_the_same_result(
    own_scheduler: Scheduler, start_system: StartSystem, workdir: Path, tmp_path: Path
) -> None:
    # Given a Redis that is restored to the moment before a fork was started
    make_guest(workdir / "a")
    own_scheduler.send({"source": str(workdir / "a"), "destination": str(workdir / "b")}, "forgotten")
    _save_data(own_scheduler, tmp_path / "copy")
    system = start_system()
    before = _result(own_scheduler, "forgotten")
    own_scheduler.wait_quiet()
    files, inode = own_scheduler.files("forgotten"), (workdir / "b").stat().st_ino

    # When
    _restore_data(system, tmp_path / "copy")

    # Then
    after = _result(own_scheduler, "forgotten")
    assert before["error"] is None
    assert after == before
    assert own_scheduler.results.states.get("forgotten")["status"] == "SUCCESS"
    assert own_scheduler.files("forgotten") == files
    check_file_results(after, files)
    assert (workdir / "b").stat().st_ino == inode
    own_scheduler.wait_quiet()

    # and for another id, or another request under that id, it does not count as the fork
    _, other = own_scheduler.wait_failed(
        own_scheduler.send({"source": str(workdir / "a"), "destination": str(workdir / "b")}, "other")
    )
    assert other["error"] is not None
    assert other["error"]["code"] == "destination_exists"
    own_scheduler.redis.flushall()
    request = {"source": str(workdir / "a"), "destination": str(workdir / "b"), "labels": ["another"]}
    _, other = own_scheduler.wait_failed(own_scheduler.send(request, "forgotten"))
    assert other["error"] is not None
    assert other["error"]["code"] == "destination_exists"
    system.assert_left_nothing_in(workdir)


def test_a_replaced_destination_is_not_mistaken_for_the_fork(
    own_scheduler: Scheduler, start_system: StartSystem, workdir: Path
) -> None:
    system = start_system()
    make_guest(workdir / "a")
    own_scheduler.fork(workdir / "a", workdir / "b", "replaced")
    shutil.rmtree(workdir / "b")
    (workdir / "b").mkdir()

    own_scheduler.redis.flushall()
    sent = own_scheduler.send({"source": str(workdir / "a"), "destination": str(workdir / "b")}, "replaced")

    _, result = own_scheduler.wait_failed(sent)
    assert result["error"] is not None
    assert result["error"]["code"] == "destination_exists"
    system.assert_left_nothing_in(workdir)


def test_a_lost_fork_whose_source_was_removed_ends_with_the_same_result(
    own_scheduler: Scheduler, start_system: StartSystem, workdir: Path
) -> None:
    system = start_system()
    make_guest(workdir / "a")
    before = own_scheduler.fork(workdir / "a", workdir / "b", "orphan")

    own_scheduler.wait_quiet()
    own_scheduler.redis.flushall()
    shutil.rmtree(workdir / "a")
    after = own_scheduler.wait(
        own_scheduler.send({"source": str(workdir / "a"), "destination": str(workdir / "b")}, "orphan")
    )

    assert after == before
    system.assert_left_nothing_in(workdir)


def test_a_campaign_that_redis_lost_ends_with_the_same_results(
    own_scheduler: Scheduler, start_system: StartSystem, workdir: Path, tmp_path: Path
) -> None:
    # Given
    source = make_source(workdir / "source")
    send(own_scheduler, request_of(source, workdir, COUNT), "many")
    _save_data(own_scheduler, tmp_path / "copy")
    system = start_system()
    _wait_for_end(own_scheduler, "many")
    own_scheduler.wait_quiet()
    before, forks = result_of(own_scheduler, "many"), forks_of(own_scheduler, "many", COUNT)
    inodes = [path.stat().st_ino for path in paths_of(workdir, COUNT)]

    # When
    _restore_data(system, tmp_path / "copy")

    # Then
    _wait_for_end(own_scheduler, "many")
    own_scheduler.wait_quiet()
    after = result_of(own_scheduler, "many")
    assert_all_are_whole(own_scheduler, after, source, paths_of(workdir, COUNT))
    assert after["forks"] == before["forks"]
    assert forks_of(own_scheduler, "many", COUNT) == forks
    assert [path.stat().st_ino for path in paths_of(workdir, COUNT)] == inodes

    # and for another campaign with the same destinations they do not count as its forks
    send(own_scheduler, request_of(source, workdir, COUNT), "other")
    _wait_for_end(own_scheduler, "other")
    own_scheduler.wait_quiet()
    assert result_of(own_scheduler, "other")["forks"]["failed"] == COUNT
    system.assert_left_nothing_in(workdir)
