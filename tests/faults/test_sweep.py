"""The sweep: forks whose message was lost are finished, abandoned staging is removed, running forks are not touched."""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from redis import Redis

from tasks.context import Context, Send
from tasks.contract.campaign_request import campaign_of, summary_of
from tasks.copier.fork_spec import ForkSpec
from tasks.copier.options import Limits
from tasks.copier.roots import Roots
from tasks.copier.staging.control_directory import control_name
from tasks.copier.staging.staging import Staging
from tasks.names import FINISH_CAMPAIGN_TASK
from tasks.store.campaign.results import CampaignResults
from tasks.store.claims import Claim
from tasks.store.results import Results
from tasks.sweep import remove_abandoned, run_sweep, sweep_forks
from tests.faults.fault_points import FaultPoints
from tests.faults.paused_forks import (
    CHILDREN,
    Guests,
    PausedFork,
    StartArmedWorker,
    assert_served_and_clean,
    start_paused_forks,
)
from tests.fixtures.processes import RunForkvm, StartWorker, wait_until
from tests.support.system.scheduler import QUEUE, QUEUES, UNACKED, Scheduler
from tests.support.system.staging_view import StagingView, leftovers
from tests.support.system.systems import System


def test_fork_whose_messages_are_lost_is_finished_by_the_sweep(
    start_armed_worker: StartArmedWorker, fault_points: FaultPoints, guests: Guests, workdir: Path
) -> None:
    # Given forks that are paused at every point
    system = start_armed_worker(CHILDREN)
    redis = system.scheduler.redis
    paused = start_paused_forks(system, fault_points, guests, workdir)

    # When all their messages are lost, as if Redis had stopped between kombu's two steps, and their processes are
    # killed
    redis.delete(*QUEUES, UNACKED, f"{UNACKED}_index")
    system.worker.kill()

    # Then another worker, which has no message of them, finishes them
    other = start_armed_worker(4)
    for one in paused:
        one.wait_for_success(other.scheduler)
    assert_served_and_clean(other, guests, workdir)


def _context(results: Results, workdir: Path) -> Context:
    """The context of a sweep in this process, which searches and removes, and sends nothing."""
    return Context(Roots((str(workdir),)), Limits(), results, lambda task, kwargs, task_id: None, QUEUE)


def test_sweeps_and_searches_in_a_tight_loop_do_not_affect_running_forks(
    own_scheduler: Scheduler,
    start_worker: StartWorker,
    mounts: Path,
    guests: Guests,
    workdir: Path,
    run_forkvm: RunForkvm,
) -> None:
    # Given sweeps in a tight loop: of the forks' own deployment, and of one that knows none of them
    worker = start_worker(mounts, env={"FORKVM_INLINE_FILES": "4", "FORKVM_CHUNK_FILES": "8"})
    system = System(own_scheduler.server, worker, own_scheduler)
    ended, sweeps = threading.Event(), [0]
    failures: list[BaseException] = []

    def sweep() -> None:
        server = own_scheduler.server
        try:
            with server.client(decode_responses=False) as client, Redis.from_url(f"{server.redis_url}?db=1") as empty:
                own = _context(replace(own_scheduler.results, redis=client), workdir)
                foreign = _context(replace(own_scheduler.results, redis=empty), workdir)
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
        # When the worker and a local command make forks at the same time
        forks = []
        for n in range(30):
            fork = PausedFork("no point", f"live-{n}", guests.large, workdir / f"live-{n}", 0)
            system.scheduler.send({"source": str(fork.source), "destination": str(fork.destination)}, fork.fork_id)
            forks.append(fork)
        local = run_forkvm("fork", guests.large, workdir / "local")

        # Then every fork is made, at its first attempt
        for fork in forks:
            fork.wait_for_success(system.scheduler)
    finally:
        ended.set()
        thread.join()
    assert failures == []
    assert local.returncode == 0, local.stderr
    assert sweeps[0] > 20
    assert "removed staging" not in worker.output()
    assert_served_and_clean(system, guests, workdir)


def test_old_staging_that_no_queue_knows_is_removed_and_staging_of_an_open_fork_is_kept(
    start_armed_worker: StartArmedWorker, fault_points: FaultPoints, guests: Guests, workdir: Path
) -> None:
    # Given the staging of two killed forks. Redis still knows one of them
    system = start_armed_worker(2)
    start_paused_forks(system, fault_points, guests, workdir, ["middle", "finish"])
    system.worker.kill()
    redis = system.scheduler.redis
    redis.delete("forkvm:middle:claim")
    context = _context(system.scheduler.results, workdir)
    forgotten, known = (StagingView(workdir, name) for name in ("middle", "finish"))

    # When
    remove_abandoned(context)
    assert forgotten.control.exists()
    forgotten.backdate()
    known.backdate()
    remove_abandoned(context)

    # Then
    assert not forgotten.control.exists()
    assert known.control.exists()
    redis.flushall()
    remove_abandoned(context)
    assert leftovers(workdir) == []


def plant(workdir: Path, fork_id: str, what: str) -> None:
    """Put an entry that is not staging of ours at the path of a fork's control directory."""
    control = workdir / control_name(fork_id)
    if what == "file":
        control.write_text("in the way")
    elif what == "FIFO":
        os.mkfifo(control)
    elif what == "symlink":
        control.symlink_to(control.name)
    else:
        control.mkdir(mode=0o700)
        os.mkfifo(control / "journal")
        if what == "foreign":
            os.chown(control, 1000, 1000)


PLANTED = ("file", "FIFO", "symlink", "FIFO as journal", "foreign")


def test_sweep_skips_a_fork_whose_staging_was_replaced(own_scheduler: Scheduler, workdir: Path) -> None:
    # Given forks whose messages are lost, some with another entry at the path of their staging or its parent
    sent: list[str] = []
    send: Send = lambda task, kwargs, task_id: sent.append(task_id)  # noqa: E731
    context = Context(Roots((str(workdir),)), Limits(), own_scheduler.results, send, QUEUE)
    (workdir / "file").touch()
    (workdir / "loop").symlink_to("loop")
    for n, what in enumerate(PLANTED):
        plant(workdir, f"planted-{n}", what)
    parents = {f"planted-{n}": "." for n in range(len(PLANTED))}
    parents |= {"in-file": "file", "in-loop": "loop", "outside": "..", "last": "."}
    for fork_id, parent in parents.items():
        destination = f"{workdir}/{parent}/{fork_id}"
        request = {"source": f"{workdir}/none", "destination": destination}
        own_scheduler.results.claims.take(fork_id, {"request": request, "destination": destination, "queue": QUEUE})

    # When
    sweep_forks(context)
    sweep_forks(context)

    # Then
    assert set(sent) == set(parents)


def test_search_of_a_worker_skips_bad_entries(own_scheduler: Scheduler, workdir: Path) -> None:
    for n, what in enumerate(PLANTED):
        plant(workdir, f"planted-{n}", what)
    workdir.joinpath("below").mkdir()
    fd = os.open(workdir / "below", os.O_RDONLY)
    with Staging.claim(fd, "dead", wait=0) as staging:
        staging.begin(ForkSpec(fork_id="dead", source="/a", destination="/b").to_data(), None)
    os.close(fd)
    missing = Context(
        Roots((str(workdir / "missing"), str(workdir))), Limits(), own_scheduler.results, lambda *_, **__: None, QUEUE
    )

    remove_abandoned(missing)

    assert not any((workdir / "below").iterdir())
    assert len(leftovers(workdir)) == len(PLANTED)


@pytest.mark.parametrize("what", PLANTED)
def test_campaign_whose_staging_was_replaced_ends_and_others_are_served(
    what: str, start_armed_worker: StartArmedWorker, guests: Guests, workdir: Path
) -> None:
    # Given a claimed campaign whose message is lost, and whose control directory was replaced by a foreign one
    system = start_armed_worker(2)
    destinations = [str(workdir / f"vm-{n}") for n in range(3)]
    request = {"source": str(guests.small), "destinations": destinations}
    spec, _ = campaign_of(request, "c1", owner="queue")
    plant(workdir, "c1", what)
    claim: Claim = {
        "request": summary_of(request, spec),
        "destination": destinations[0],
        "queue": QUEUE,
        "campaign": True,
    }
    system.scheduler.results.claims.take("c1", claim)

    # When a sweep sends it again
    system.scheduler.app.send_task(
        FINISH_CAMPAIGN_TASK, kwargs={"home": destinations[0]}, task_id="c1", queue=f"{QUEUE}#finish"
    )

    # Then it ends without a fork, and the worker serves another fork
    ended = ("SUCCESS", "FAILURE", "REVOKED")
    wait_until(lambda: system.scheduler.results.states.get("c1")["status"] in ended, "the end of the campaign")
    result = CampaignResults(system.scheduler.results, "c1").result()
    assert result is not None
    assert (result["status"], result["forks"]["failed"]) == ("failed", 3)
    assert not any((workdir / f"vm-{n}").exists() for n in range(3))
    system.scheduler.fork(guests.small, workdir / "next", "next")
