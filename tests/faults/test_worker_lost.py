"""A whole worker that is killed or stopped with a signal, with a fork at every point."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.faults.fault_points import PUBLISHED, FaultPoints
from tests.faults.paused_forks import (
    CHILDREN,
    Guests,
    StartArmedWorker,
    assert_served_and_clean,
    resume,
    start_paused_forks,
)
from tests.fixtures.processes import wait_until
from tests.support.processor import LoadFreeStopwatch
from tests.support.system.result_checks import identity
from tests.support.system.scheduler import UNACKED
from tests.support.system.systems import send
from worker.runtime.configuration import make_app
from worker.settings import read_settings

#: Seconds for another worker to do everything that a killed one had started; the visibility timeout is 5 s here.
TAKEN_OVER_SECONDS = 15.0


def test_forks_of_a_killed_worker_are_made_by_another_within_seconds(
    start_armed_worker: StartArmedWorker, fault_points: FaultPoints, guests: Guests, workdir: Path
) -> None:
    # Given a worker with a fork at every point, and another worker beside it
    system = start_armed_worker(CHILDREN)
    paused = start_paused_forks(system, fault_points, guests, workdir)
    other = start_armed_worker()
    published = {one: identity(one.destination) for one in paused if one.point in PUBLISHED}

    # When
    system.worker.kill()
    stopwatch = LoadFreeStopwatch(other.pids)

    # Then
    for one in paused:
        one.wait_for_success(other.scheduler)
    assert stopwatch.seconds() < TAKEN_OVER_SECONDS
    assert {one: identity(one.destination) for one in published} == published  # not made twice
    assert_served_and_clean(other, guests, workdir)


@pytest.mark.parametrize(
    "signals",
    [
        pytest.param([signal.SIGTERM], id="SIGTERM"),
        pytest.param([signal.SIGTERM, signal.SIGTERM], id="SIGTERM and a second one"),
        pytest.param([signal.SIGQUIT], id="SIGQUIT"),
    ],
)
def test_worker_that_is_stopped_returns_or_finishes_all_its_tasks(
    start_armed_worker: StartArmedWorker,
    fault_points: FaultPoints,
    guests: Guests,
    workdir: Path,
    signals: list[signal.Signals],
) -> None:
    # Given
    system = start_armed_worker(CHILDREN)
    paused = start_paused_forks(system, fault_points, guests, workdir)

    # When
    for number in signals:
        send([system.worker.pid], number)
        wait_until(lambda: "\nworker: " in system.worker.output(), "the worker to log its shutdown")
    resume(paused)

    # Then it exits by itself, and holds no message any more
    system.worker.wait()
    assert system.scheduler.messages()[UNACKED] == 0
    next_worker = start_armed_worker(4)
    for one in paused:
        one.wait_for_success(next_worker.scheduler)
    assert_served_and_clean(next_worker, guests, workdir)


def test_worker_killed_while_it_restores_messages_does_not_block_another_from_doing_so(
    start_armed_worker: StartArmedWorker, fault_points: FaultPoints, guests: Guests, workdir: Path
) -> None:
    # Given a worker that was killed while it made a fork, and kombu's redelivery lock, set as its settings say
    killed_system = start_armed_worker(1)
    paused = start_paused_forks(killed_system, fault_points, guests, workdir, ["plan"])
    killed_system.worker.kill()
    settings = read_settings(roots=str(workdir), broker_url=killed_system.server.broker_url)
    options = make_app(settings).conf.broker_transport_options
    lock = killed_system.scheduler.redis.lock(options["unacked_mutex_key"], timeout=options["unacked_mutex_expire"])
    assert lock.acquire(blocking=False)

    # When another worker starts
    other = start_armed_worker()

    # Then
    for one in paused:
        one.wait_for_success(other.scheduler, TAKEN_OVER_SECONDS)
    assert_served_and_clean(other, guests, workdir)
