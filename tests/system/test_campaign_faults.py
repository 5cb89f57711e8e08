"""Campaigns whose workers are killed or paused, or whose Redis stops: every fork is made once, and none is torn."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fixtures.filesystems import Fresh, SmallTmpfs, fresh_directory
from tests.fixtures.processes import StartWorker, wait_until
from tests.support.guests import MIB
from tests.support.processor import LoadFreeStopwatch, wait_until_asleep
from tests.support.system.queued_campaigns import (
    assert_all_are_whole,
    done,
    forks_of,
    make_source,
    paths_of,
    published_forks,
    request_of,
    result_of,
    send,
)
from tests.support.system.result_checks import identity
from tests.support.system.scheduler import UNACKED, Scheduler
from tests.support.system.staging_view import leftovers
from tests.support.system.systems import StartSystem, System, spin_until, stopped_when
from tests.support.system.systems import send as send_signal

#: A killed worker's messages are delivered again as soon as possible.
SHORT = {"FORKVM_VISIBILITY_TIMEOUT": "5"}
DOMAIN = "nvme-a"


@pytest.fixture(scope="module")
def source(xfs: Path) -> Iterator[Path]:
    with fresh_directory(xfs) as parent:
        yield make_source(parent / "source")


@pytest.fixture
def workdir(fresh: Fresh) -> Path:
    return fresh("xfs")


def is_running(scheduler: Scheduler, campaign_id: str, count: int) -> bool:
    return 0 < done(scheduler, campaign_id) < count


def wait_for_end(scheduler: Scheduler, campaign_id: str, timeout: float = 60.0) -> None:
    """The test reads Redis directly: Celery's own wait does not survive a restart of the server."""
    wait_until(lambda: scheduler.results.final.get(campaign_id) is not None, f"the result of {campaign_id}", timeout)


def test_a_killed_child_only_delays_a_campaign(
    system: System, scheduler: Scheduler, source: Path, workdir: Path
) -> None:
    sent = send(scheduler, request_of(source, workdir, 400), "child")
    spin_until(lambda: is_running(scheduler, "child", 400), "a half-done campaign")

    send_signal(system.worker.children[:1], signal.SIGKILL)

    assert_all_are_whole(scheduler, sent.get(timeout=40), source, paths_of(workdir, 400))
    system.assert_left_nothing_in(workdir)


def test_two_workers_of_a_domain_share_a_campaign_and_one_ends_it_when_the_other_is_killed(
    own_scheduler: Scheduler, start_worker: StartWorker, mounts: Path, source: Path, workdir: Path
) -> None:
    # Given two workers of one domain, and one of the default domain
    scheduler, queue = own_scheduler, f"forkvm.{DOMAIN}"
    served = {"command": "forkvm", "args": ["--domain", DOMAIN], "env": SHORT}
    workers = [start_worker(mounts, 1, wait=False, **served) for _ in range(2)]  # type: ignore[arg-type]
    other = start_worker(mounts, 1)
    for worker in workers:
        worker.wait_until_ready()
    send(scheduler, request_of(source, workdir, 600), "shared", queue)
    spin_until(
        lambda: is_running(scheduler, "shared", 600) and all("forkvm.batch[" in w.output() for w in workers),
        "both to be running",
    )

    # When
    workers[0].kill()
    stopwatch = LoadFreeStopwatch(lambda: [workers[1].pid, *workers[1].children, scheduler.server.pid])

    # Then
    wait_for_end(scheduler, "shared")
    took = stopwatch.seconds()
    assert_all_are_whole(scheduler, result_of(scheduler, "shared"), source, paths_of(workdir, 600))
    wait_until(lambda: not leftovers(workdir), "the removal of all staging")
    assert "shared" not in other.output()
    assert took < 15
    keys = [f"{queue}{inner}" for inner in ("", "#batch", "#chunk", "#finish")]
    wait_until(lambda: not scheduler.redis.exists(*keys, UNACKED), "the end of all messages")


def test_a_paused_worker_loses_its_batches_and_writes_nothing_into_published_forks(
    own_scheduler: Scheduler, start_worker: StartWorker, mounts: Path, source: Path, workdir: Path
) -> None:
    # Given a worker that was stopped with batches in progress
    scheduler = own_scheduler
    paused_worker = start_worker(mounts, env=SHORT)
    send(scheduler, request_of(source, workdir, 400), "paused")
    spin_until(lambda: is_running(scheduler, "paused", 400), "a half-done campaign")
    os.killpg(paused_worker.pid, signal.SIGSTOP)
    try:
        # When another one has ended the campaign
        start_worker(mounts, env=SHORT)
        wait_for_end(scheduler, "paused", 90)
        result = result_of(scheduler, "paused")
        paths = paths_of(workdir, 400)
        published = {path: identity(path) for path in paths}
    finally:
        os.killpg(paused_worker.pid, signal.SIGCONT)
    wait_until_asleep(lambda: paused_worker.children, "the paused worker to be idle")

    # Then
    assert_all_are_whole(scheduler, result, source, paths)
    assert {path: identity(path) for path in paths} == published
    assert result_of(scheduler, "paused") == result
    wait_until(lambda: not leftovers(workdir), "the removal of the stopped child's staging")
    scheduler.wait_quiet()


def test_a_campaign_whose_redis_is_killed_and_started_again_ends_with_its_true_result(
    start_system: StartSystem, source: Path, workdir: Path
) -> None:
    system = start_system(SHORT)
    scheduler, count = system.scheduler, 600
    send(scheduler, request_of(source, workdir, count), "away")
    spin_until(lambda: is_running(scheduler, "away", count), "a half-done campaign")

    system.server.kill()
    system.server.start()

    wait_for_end(scheduler, "away")
    assert_all_are_whole(scheduler, result_of(scheduler, "away"), source, paths_of(workdir, count))
    wait_until(lambda: scheduler.results.states.get("away")["status"] == "SUCCESS", "the campaign's state")
    assert system.worker.running
    wait_until(lambda: not leftovers(workdir), "the removal of all staging")
    scheduler.redis.delete(UNACKED, f"{UNACKED}_index", f"{UNACKED}_mutex")


def test_a_campaign_whose_redis_is_full_ends_with_its_true_result_once_there_is_room(
    start_system: StartSystem, source: Path, workdir: Path
) -> None:
    # Given
    system = start_system(SHORT)
    scheduler, count = system.scheduler, 600
    send(scheduler, request_of(source, workdir, count), "full")

    # When there is no room for the results of its batches
    with stopped_when(system.worker, lambda: is_running(scheduler, "full", count), "a half-done campaign"):
        scheduler.redis.config_set("maxmemory", "1mb")
        done_before = done(scheduler, "full")
    scheduler.wait_refused(len(system.worker.children) * 4)
    assert done(scheduler, "full") == done_before
    scheduler.redis.config_set("maxmemory", "0")

    # Then
    wait_for_end(scheduler, "full")
    assert_all_are_whole(scheduler, result_of(scheduler, "full"), source, paths_of(workdir, count))
    wait_until(lambda: scheduler.results.states.get("full")["status"] == "SUCCESS", "the campaign's state")
    assert system.worker.running
    system.assert_left_nothing_in(workdir)


def test_an_emptied_redis_gives_no_false_success_and_the_id_can_be_used_again(
    system: System, scheduler: Scheduler, source: Path, workdir: Path, fresh: Fresh
) -> None:
    # Given
    send(scheduler, request_of(source, workdir, 1000), "forgotten")
    spin_until(lambda: is_running(scheduler, "forgotten", 1000), "a half-done campaign")

    # When
    scheduler.redis.flushall()
    scheduler.wait_quiet()

    # Then
    assert scheduler.results.final.get("forgotten") is None
    assert scheduler.results.states.get("forgotten")["status"] not in ("SUCCESS", "FAILURE")
    before = published_forks(workdir)
    assert len(before) < 1000

    # and another campaign with that id makes what it requests, beside the forks of the first
    request = request_of(source, workdir, 30) | {"destinations": [str(workdir / f"again-{n}") for n in range(30)]}
    result = send(scheduler, request, "forgotten").get(timeout=30)
    assert result["forks"]["total"] == 30
    assert_all_are_whole(scheduler, result, source, [workdir / f"again-{n}" for n in range(30)])
    assert published_forks(workdir) == before
    system.assert_left_nothing_in(workdir)


def test_a_removed_staging_ends_the_campaign_with_a_clear_failure(
    system: System, scheduler: Scheduler, source: Path, workdir: Path
) -> None:
    send(scheduler, request_of(source, workdir, 2000), "robbed")
    spin_until(lambda: is_running(scheduler, "robbed", 2000), "a half-done campaign")

    (control,) = (path for path in workdir.glob(".forkvm-*") if "." not in path.name[1:])
    control.rename(workdir / "elsewhere")

    wait_for_end(scheduler, "robbed")
    result = result_of(scheduler, "robbed")
    assert result["status"] in ("partial", "failed")
    assert result["error"] is not None
    assert result["error"]["code"] == "io_error"
    succeeded = [fork for fork in forks_of(scheduler, "robbed", 2000) if fork["status"] == "succeeded"]
    assert result["forks"]["succeeded"] == len(succeeded)
    assert all(Path(fork["destination"]).is_dir() for fork in succeeded)
    system.assert_left_nothing_in(workdir)


def test_each_fork_of_a_campaign_on_a_full_disk_is_no_space_and_names_its_destination(
    system: System, scheduler: Scheduler, source: Path, small_tmpfs: SmallTmpfs
) -> None:
    """Free space from too little for the plan to enough for some forks of 56 KiB."""
    for left in (0, 32 << 10, 96 << 10, 224 << 10):
        disk = small_tmpfs(MIB)
        (disk / "workdir").mkdir()
        with (disk / "filler").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - left)
        workdir, campaign_id = disk / "workdir", f"full-{left}"

        send(scheduler, request_of(source, workdir, 10), campaign_id)
        wait_for_end(scheduler, campaign_id)

        forks = forks_of(scheduler, campaign_id, 10)
        assert (len(forks), leftovers(workdir)) == (10, [])
        assert len(published_forks(workdir)) == result_of(scheduler, campaign_id)["forks"]["succeeded"]
        for fork in forks:
            if (error := fork["error"]) is not None:
                assert error["code"] == "no_space"
                assert f"{error['path']}/".startswith(f"{fork['destination']}/")
