"""The sweep: what lost its message is finished, what is abandoned goes, and what lives is not touched."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

from redis import Redis

from tasks.context import Context
from tasks.copier.kernel.roots import Roots
from tasks.copier.options import Limits
from tasks.results import Results
from tasks.sweep import remove_abandoned, run_sweep
from tests.faults.fleet import CHILDREN, Guests, StartStruck, Struck, assert_served_and_clean, stand_at
from tests.faults.moments import Moments
from tests.fixtures.processes import RunForkvm, StartWorker
from tests.system.running import System
from tests.system.scheduler import QUEUE, QUEUES, UNACKED, Scheduler
from tests.system.staging import StagingView, leftovers


def test_fork_whose_messages_are_lost_is_finished(
    start_struck: StartStruck, moments: Moments, guests: Guests, place: Path
) -> None:
    # Given forks that stand at every moment
    system = start_struck(CHILDREN)
    redis = system.scheduler.redis
    struck = stand_at(system, moments, guests, place)

    # When every message of theirs is lost, as if Redis had gone between kombu's two steps, and their processes die
    redis.delete(*QUEUES, UNACKED, f"{UNACKED}_index")
    system.worker.kill()

    # Then another worker, which has no message of theirs, finishes them
    other = start_struck(4)
    for one in struck:
        one.wait_for_success(other.scheduler)
    assert_served_and_clean(other, guests, place)


def _context(results: Results, place: Path) -> Context:
    """Of a sweep in this process, which looks and removes, and sends nothing."""
    return Context(Roots((str(place),)), Limits(), results, lambda task, kwargs, task_id: None, QUEUE)


def test_sweeps_and_searches_in_a_tight_loop_leave_every_live_fork_alone(
    own_scheduler: Scheduler,
    start_worker: StartWorker,
    mounts: Path,
    guests: Guests,
    place: Path,
    run_forkvm: RunForkvm,
) -> None:
    # Given sweeps, as fast as they go: of the forks' own deployment, and of one that knows none of them
    worker = start_worker(mounts, env={"FORKVM_INLINE_FILES": "4", "FORKVM_CHUNK_FILES": "8"})
    system = System(own_scheduler.server, worker, own_scheduler)
    ended, sweeps = threading.Event(), [0]
    failures: list[BaseException] = []

    def sweep() -> None:
        server = own_scheduler.server
        try:
            with server.client(decode_responses=False) as client, Redis.from_url(f"{server.redis_url}?db=1") as empty:
                own = _context(replace(own_scheduler.results, redis=client), place)
                foreign = _context(replace(own_scheduler.results, redis=empty), place)
                while not ended.is_set():
                    for context in (own, foreign):
                        remove_abandoned(context)
                        run_sweep(context, 5)
                    sweeps[0] += 1
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=sweep)
    thread.start()
    try:
        # When forks are made beside them, by the worker and by a local command
        forks = []
        for n in range(30):
            fork = Struck("no moment", f"live-{n}", guests.large, place / f"live-{n}", 0)
            system.scheduler.send({"source": str(fork.source), "destination": str(fork.destination)}, fork.fork_id)
            forks.append(fork)
        local = run_forkvm("fork", guests.large, place / "local")

        # Then every one is made, at its first try
        for fork in forks:
            fork.wait_for_success(system.scheduler)
    finally:
        ended.set()
        thread.join()
    assert failures == []
    assert local.returncode == 0, local.stderr
    assert sweeps[0] > 20
    assert "removed staging" not in worker.output()
    assert_served_and_clean(system, guests, place)


def test_staging_that_no_queue_knows_goes_when_it_is_old_and_that_of_an_open_fork_stays(
    start_struck: StartStruck, moments: Moments, guests: Guests, place: Path
) -> None:
    # Given the staging of two dead forks, one of which Redis still knows
    system = start_struck(2)
    stand_at(system, moments, guests, place, ["middle", "finish"])
    system.worker.kill()
    redis = system.scheduler.redis
    redis.delete("forkvm:middle:claim")
    context = _context(system.scheduler.results, place)
    forgotten, known = (StagingView(place, name) for name in ("middle", "finish"))

    # When
    remove_abandoned(context)
    assert forgotten.control.exists()
    forgotten.grow_old()
    known.grow_old()
    remove_abandoned(context)

    # Then
    assert not forgotten.control.exists()
    assert known.control.exists()
    redis.flushall()
    remove_abandoned(context)
    assert leftovers(place) == []
