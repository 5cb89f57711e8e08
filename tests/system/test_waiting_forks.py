"""Waiting small forks are made by the process that has just made one: each once, whatever happens meanwhile."""

from __future__ import annotations

import random
import re
import signal
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import pytest
from celery.result import AsyncResult

from tests.fixtures.filesystems import Fresh
from tests.fixtures.processes import StartWorker, wait_until
from tests.support.engine.forks import assert_alike
from tests.support.guests import SKIPPED_BY_DEFAULT, make_guest
from tests.support.system.result_checks import check_file_results
from tests.support.system.scheduler import QUEUE, UNACKED, Scheduler
from tests.support.system.systems import System, send, stopped_when

FORKS = 60


@pytest.fixture
def directory(fresh: Fresh) -> Path:
    directory = fresh("xfs")
    make_guest(directory / "a")
    return directory


def _send(scheduler: Scheduler, directory: Path, count: int = FORKS, name: str = "b") -> dict[str, Path]:
    """Send forks. Returns their destinations by id."""
    destinations = {f"{directory.name}-{name}-{n}": directory / f"{name}-{n}" for n in range(count)}
    for fork_id, destination in destinations.items():
        scheduler.send({"source": str(directory / "a"), "destination": str(destination)}, fork_id)
    return destinations


def _send_at_once(system: System, directory: Path, count: int) -> dict[str, Path]:
    """As `_send`, while no pool process runs: then all messages wait."""
    children = system.worker.children
    send(children, signal.SIGSTOP)
    try:
        return _send(system.scheduler, directory, count)
    finally:
        send(children, signal.SIGCONT)


def _received(system: System) -> set[str]:
    """The forks whose messages the worker's main process took, by id."""
    return set(re.findall(r"Task forkvm\.fork\[(\S+)\] received", system.worker.output()))


def _taken(scheduler: Scheduler) -> list[bytes]:
    """The delivery tags of messages that pool processes have taken themselves."""
    return [tag for tag in cast("list[bytes]", scheduler.redis.hkeys(UNACKED)) if b"." in tag]


def _check_all(scheduler: Scheduler, destinations: dict[str, Path], source: Path) -> None:
    for fork_id, destination in destinations.items():
        result = scheduler.wait(scheduler.app.AsyncResult(fork_id))
        assert (result["fork_id"], result["status"], result["destination"]) == (fork_id, "succeeded", str(destination))
        check_file_results(result, scheduler.files(fork_id))
    for destination in random.Random(5).sample(sorted(destinations.values()), min(10, len(destinations))):
        assert_alike(source, destination, SKIPPED_BY_DEFAULT)


def test_most_waiting_forks_are_taken_by_a_pool_process(system: System, scheduler: Scheduler, directory: Path) -> None:
    destinations = _send(scheduler, directory)

    _check_all(scheduler, destinations, directory / "a")
    assert len(_received(system) & set(destinations)) < FORKS  # on a busy machine, some are returned to the queue
    system.assert_left_nothing_in(directory)


def test_a_fork_ends_before_those_that_its_process_makes_after_it(
    start_worker: StartWorker, own_scheduler: Scheduler, mounts: Path, directory: Path
) -> None:
    """They wait when the worker starts. Its one process makes them in the order in which they were sent."""
    destinations = _send(own_scheduler, directory, 20)

    start_worker(mounts, 1)
    _check_all(own_scheduler, destinations, directory / "a")

    ends = [datetime.fromisoformat(own_scheduler.results.states.get(fork_id)["date_done"]) for fork_id in destinations]
    assert ends == sorted(ends)
    own_scheduler.wait_quiet()


def test_the_ends_of_forks_are_stored_before_a_long_one_that_the_same_process_makes(
    start_worker: StartWorker, own_scheduler: Scheduler, mounts: Path, directory: Path, tmp_path: Path
) -> None:
    (directory / "long").mkdir()
    (directory / "long" / "disk").write_bytes(bytes(range(256)) * (24 << 10))
    env = {"FORKVM_COPY_RATE": "1048576", "FORKVM_RUNTIME_DIR": str(tmp_path / "runtime")}

    for attempt in range(5):
        small = _send(own_scheduler, directory, 4, f"small-{attempt}")
        request = {"source": str(directory / "long"), "destination": str(directory / f"copy-{attempt}")}
        long = own_scheduler.send(request | {"reflink": "never"})
        worker = start_worker(mounts, 1, env=env)
        _check_all(own_scheduler, small, directory / "a")
        wait_until(lambda: len(_taken(own_scheduler)) <= 1, "the end of all messages but one")
        assert own_scheduler.results.final.fork(str(long.id)) is None
        assert own_scheduler.wait(long)["chunks"] == 1

        states = [own_scheduler.results.states.get(fork_id) for fork_id in (*small, long.id)]
        *ends, last = [datetime.fromisoformat(state["date_done"]) for state in states]
        assert (last - max(ends)).total_seconds() > 1
        own_scheduler.wait_quiet()
        if worker.output().count(" received") == 1:  # the process took the others itself
            return
        worker.end()  # on a busy machine, it returned some of them to the queue
    raise AssertionError("the process never took all messages itself")


def test_waiting_forks_of_a_killed_process_are_made_once(system: System, scheduler: Scheduler, directory: Path) -> None:
    destinations = _send_at_once(system, directory, 4 * FORKS)
    with stopped_when(system.worker, lambda: bool(_taken(scheduler)), "a process that has taken messages") as children:
        send(children, signal.SIGKILL)

    _check_all(scheduler, destinations, directory / "a")
    system.assert_left_nothing_in(directory)
    system.worker.wait_for_output("messages that a lost process had taken go back to their queue")


def test_forks_taken_by_a_paused_process_are_made_by_others(
    system: System, scheduler: Scheduler, directory: Path
) -> None:
    destinations = _send_at_once(system, directory, 2 * FORKS)
    with stopped_when(system.worker, lambda: bool(_taken(scheduler)), "a process that has taken messages") as children:
        send(children[1:], signal.SIGCONT)
        _check_all(scheduler, destinations, directory / "a")
    system.assert_left_nothing_in(directory)


def test_small_forks_do_not_wait_behind_a_long_one(
    system: System, scheduler: Scheduler, directory: Path, large_source: Path, workdir: Path
) -> None:
    """The process that has taken them returns them, and other processes make them."""
    before = _send(scheduler, directory, 10)
    long = scheduler.send({"source": str(large_source), "destination": str(workdir / "long")}, "long")
    after = _send(scheduler, directory, 20, "c")

    _check_all(scheduler, before | after, directory / "a")
    assert scheduler.wait(long)["status"] == "succeeded"
    system.assert_left_nothing_in(directory, workdir)


def test_requests_with_extra_fields_are_answered_among_plain_ones(
    system: System, scheduler: Scheduler, directory: Path
) -> None:
    def request(name: str) -> dict[str, str]:
        return {"source": str(directory / "a"), "destination": str(directory / name)}

    def send_with(name: str, **options: Any) -> AsyncResult[Any]:
        call = {"request": request(name)}
        return scheduler.app.send_task("forkvm.fork", kwargs=call, task_id=name, queue=QUEUE, **options)

    scheduler.results.cancellations.request("cancelled")
    first = _send(scheduler, directory, 20)
    good = [send_with("limited", time_limit=60), *(scheduler.send(request("twice"), "twice") for _ in range(2))]
    bad = {
        "cancelled": [send_with("late", expires=-1), scheduler.send(request("no"), "cancelled")],
        "invalid_request": [scheduler.send({"source": "/a", "destination": "b"}), scheduler.send_call()],
        "destination_exists": [scheduler.send(request("a"))],
    }
    second = _send(scheduler, directory, 20, "c")

    _check_all(scheduler, first | second, directory / "a")
    assert [scheduler.wait(sent)["status"] for sent in good] == ["succeeded"] * 3
    for code, failed in bad.items():
        for sent in failed:
            result = scheduler.wait_failed(sent)[1]
            assert result["error"] is not None
            assert result["error"]["code"] == code
    system.assert_left_nothing_in(directory)
