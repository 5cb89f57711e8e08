"""Workers that do not answer any more: the overview and `forkvm queues` still name them."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import gethostname

import pytest
from celery import Celery

from tasks.store.keys import WORKERS
from tests.fixtures.processes import RunForkvm, StartWorker, Worker, program_environment, wait_until
from tests.fixtures.redis_server import RedisServer
from worker import overview
from worker.client import Client
from worker.settings import Settings

#: A worker writes its record every 10 s.
INTERVAL = 10.0
#: kombu's set of the mailboxes for remote control.
MAILBOXES = "_kombu.binding.celery.pidbox"


def _name(which: str) -> str:
    return f"{which}@{gethostname()}"


@pytest.fixture
def workers(redis_server: RedisServer) -> Callable[[], dict[str, overview.Worker]]:
    """The workers of the overview, by the part of their names before the host."""
    client = Client(Settings(broker_url=redis_server.broker_url, result_backend=redis_server.backend_url))

    def found() -> dict[str, overview.Worker]:
        listed = client.overview().workers
        assert len({worker.name for worker in listed}) == len(listed)
        return {worker.name.partition("@")[0]: worker for worker in listed}

    return found


@contextmanager
def _stopped(worker: Worker) -> Iterator[None]:
    os.kill(worker.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(worker.pid, signal.SIGCONT)


def test_a_stopped_and_a_killed_worker_are_listed_with_their_last_heartbeats_and_one_that_ended_is_not(
    redis_server: RedisServer,
    start_worker: StartWorker,
    run_forkvm: RunForkvm,
    workers: Callable[[], dict[str, overview.Worker]],
    tmp_path: Path,
) -> None:
    # Given
    stopped, killed, ended, _ = (
        start_worker(tmp_path, 1, command="celery", args=["-n", f"{name}@%h"], wait=False)
        for name in ("stopped", "killed", "ended", "well")
    )
    wait_until(lambda: [worker.answers for worker in workers().values()] == [True] * 4, "four workers")
    environment = program_environment(redis_server)

    # When
    killed.kill()
    ended.end()
    with _stopped(stopped):
        found = workers()
        later = workers()
        as_json = run_forkvm("queues", "--json", env=environment)
        table = run_forkvm("queues", env=environment)

    # Then
    assert {name: worker.answers for name, worker in found.items()} == {"stopped": False, "killed": False, "well": True}
    for name in ("stopped", "killed"):
        lost = found[name]
        assert (lost.name, lost.host, lost.queues, lost.ending) == (_name(name), gethostname(), ["forkvm"], False)
        assert (lost.children, lost.busy, lost.idle) == (1, None, None)
        assert 0 <= lost.heartbeat_seconds < later[name].heartbeat_seconds
    assert (found["well"].host, found["well"].busy, found["well"].idle) == (gethostname(), 0, 1)

    printed = {worker["name"]: worker for worker in json.loads(as_json.stdout)["workers"]}
    assert printed[_name("killed")]["answers"] is False
    assert printed[_name("killed")]["busy"] is printed[_name("killed")]["idle"] is None
    assert "Workers: 1, 0 of 1 children busy; 2 without an answer" in table.stdout
    lines = table.stderr.splitlines()
    assert [line.partition(";")[0] for line in lines] == [
        f"forkvm: worker {_name('killed')} does not answer",
        f"forkvm: worker {_name('stopped')} does not answer",
    ]
    assert all("; its last heartbeat was " in line for line in lines)


def test_a_stopped_worker_that_continues_is_well_again(
    start_worker: StartWorker, workers: Callable[[], dict[str, overview.Worker]], tmp_path: Path
) -> None:
    worker = start_worker(tmp_path, 1)

    with _stopped(worker):
        assert [each.answers for each in workers().values()] == [False]

    wait_until(lambda: [each.answers for each in workers().values()] == [True], "the worker's answer")


def test_a_worker_that_starts_removes_the_mailbox_of_one_that_was_killed_long_ago(
    redis_server: RedisServer, start_worker: StartWorker, tmp_path: Path
) -> None:
    def mailboxes() -> set[str]:
        return {str(binding).rpartition("\x16")[2].partition("@")[0] for binding in client.smembers(MAILBOXES)}

    start_worker(tmp_path, 1, command="celery", args=["-n", "killed@%h"]).kill()
    with redis_server.client() as client:
        record = json.loads(str(client.hget(WORKERS.pattern, _name("killed"))))
        client.hset(WORKERS.pattern, _name("killed"), json.dumps(record | {"seen_at": record["seen_at"] - 7200}))
        assert mailboxes() == {"killed"}

        start_worker(tmp_path, 1, command="celery", args=["-n", "new@%h"])

        wait_until(lambda: mailboxes() == {"new"}, "the removal of the mailbox")


def test_a_worker_that_takes_the_name_of_a_killed_one_replaces_it(
    start_worker: StartWorker, workers: Callable[[], dict[str, overview.Worker]], tmp_path: Path
) -> None:
    start_worker(tmp_path, 1, command="celery", args=["-n", "same@%h"]).kill()
    assert {name: (worker.answers, worker.children) for name, worker in workers().items()} == {"same": (False, 1)}

    again = start_worker(tmp_path, 2, command="celery", args=["-n", "same@%h"])
    assert {name: (worker.answers, worker.children) for name, worker in workers().items()} == {"same": (True, 2)}

    again.kill()
    assert {name: (worker.answers, worker.children) for name, worker in workers().items()} == {"same": (False, 2)}


def test_a_worker_that_finishes_its_task_after_sigterm_is_listed_as_ending_until_it_has_ended(
    redis_server: RedisServer,
    start_worker: StartWorker,
    run_forkvm: RunForkvm,
    foreign_client: Celery,
    workers: Callable[[], dict[str, overview.Worker]],
    tmp_path: Path,
) -> None:
    worker = start_worker(tmp_path, 1, include="tests.support.system.long_task")
    end = tmp_path / "end"
    foreign_client.send_task("tests.awaiting_task", kwargs={"path": str(end)}, task_id="long", queue="forkvm")
    worker.wait_for_output("tests.awaiting_task[long] received")

    worker.term()
    wait_until(lambda: [each.ending for each in workers().values()] == [True], "a worker that ends")
    table = run_forkvm("queues", env=program_environment(redis_server))
    end.touch()

    assert worker.wait() == 0
    assert workers() == {}
    first, second = table.stderr.splitlines()
    assert first == "forkvm: no worker of forkvm answers"
    assert "was told to end" in second


def test_a_worker_that_is_ended_at_once_is_not_listed(
    start_worker: StartWorker, workers: Callable[[], dict[str, overview.Worker]], tmp_path: Path
) -> None:
    worker = start_worker(tmp_path, 1)
    assert len(workers()) == 1

    os.kill(worker.pid, signal.SIGQUIT)
    worker.wait()

    assert workers() == {}


def test_a_worker_without_a_record_is_listed_when_it_answers(
    redis_server: RedisServer,
    start_worker: StartWorker,
    workers: Callable[[], dict[str, overview.Worker]],
    tmp_path: Path,
) -> None:
    """As a worker of an earlier version; and the record of this version is back within its interval."""
    start_worker(tmp_path, 1)

    with redis_server.client() as redis:
        redis.delete(WORKERS.pattern)
        (without,) = workers().values()
        wait_until(lambda: bool(redis.exists(WORKERS.pattern)), "the next record", INTERVAL + 10)
        assert 0 < redis.ttl(WORKERS.pattern) <= 3600

    assert (without.answers, without.host, without.idle) == (True, None, 1)


def test_a_worker_whose_record_is_refused_logs_it_once_and_continues(
    redis_server: RedisServer,
    start_worker: StartWorker,
    workers: Callable[[], dict[str, overview.Worker]],
    tmp_path: Path,
) -> None:
    warning = "the record of this worker was not written"
    with redis_server.client() as redis:
        # Given
        redis.set(WORKERS.pattern, "not a hash", ex=3600)
        worker = start_worker(tmp_path, 1)
        worker.wait_for_output(warning)

        # When it has written twice
        errors = int(redis.info("errorstats")["errorstat_WRONGTYPE"]["count"])
        wait_until(
            lambda: int(redis.info("errorstats")["errorstat_WRONGTYPE"]["count"]) > errors, "a write", INTERVAL + 10
        )

        # Then
        assert worker.output().count(warning) == 1
        redis.delete(WORKERS.pattern)
        assert [each.answers for each in workers().values()] == [True]
