"""The keys of a job in Redis outlive the job, however long it runs and however long its workers are down."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis

from tasks.context import Context
from tasks.copier.options import Limits
from tasks.copier.roots import Roots
from tasks.sweep import remove_abandoned
from tests.fixtures.filesystems import Fresh, fresh_directory
from tests.fixtures.processes import StartWorker, wait_until
from tests.support.engine.forks import assert_alike
from tests.support.guests import SKIPPED_BY_DEFAULT
from tests.support.system.queued_campaigns import (
    assert_all_are_whole,
    done,
    forks_of,
    make_source,
    paths_of,
    request_of,
    result_of,
    send,
)
from tests.support.system.scheduler import QUEUE, Scheduler
from tests.support.system.staging_view import StagingView, leftovers
from tests.support.system.systems import SMALL_LIMITS, spin_until, stopped_in_the_middle

EXPIRES = 60
ENVIRONMENT = SMALL_LIMITS | {"FORKVM_RESULT_EXPIRES": str(EXPIRES), "FORKVM_VISIBILITY_TIMEOUT": "5"}
THREE_DAYS = 3 * 86_400


@pytest.fixture(scope="module")
def source(xfs: Path) -> Iterator[Path]:
    with fresh_directory(xfs) as parent:
        yield make_source(parent / "source")


def advance_ttls(redis: Redis, seconds: int) -> None:
    """Change the TTL of each key as if so many seconds had passed."""
    for key in redis.scan_iter():
        ttl = redis.ttl(key)
        if ttl >= 0:
            redis.expire(key, ttl - seconds)  # deletes it if no TTL is left


def test_campaign_survives_an_outage_of_its_workers_that_is_longer_than_results_are_kept(
    own_scheduler: Scheduler, start_worker: StartWorker, mounts: Path, source: Path, fresh: Fresh
) -> None:
    # Given a campaign that is half done when its only worker is killed
    scheduler, workdir, count = own_scheduler, fresh("xfs"), 600
    worker = start_worker(mounts, env=ENVIRONMENT)
    send(scheduler, request_of(source, workdir, count), "long")
    spin_until(lambda: 0 < done(scheduler, "long") < count, "a half-done campaign")
    worker.kill()
    forks = forks_of(scheduler, "long", count)
    assert 0 < len(forks) < count

    # When no worker runs for three days
    advance_ttls(scheduler.redis, THREE_DAYS)

    # Then its client still sees it, and the results of its ended forks
    assert scheduler.results.states.get("long")["status"] in ("STARTED", "PROGRESS")
    assert forks_of(scheduler, "long", count) == forks

    # and a worker ends it, and from then on all its keys are kept equally long
    start_worker(mounts, env=ENVIRONMENT)
    wait_until(lambda: scheduler.results.final.get("long") is not None, "the end", 60)
    assert_all_are_whole(scheduler, result_of(scheduler, "long"), source, paths_of(workdir, count))
    scheduler.wait_quiet()
    assert leftovers(workdir) == []
    advance_ttls(scheduler.redis, EXPIRES)
    assert list(scheduler.redis.scan_iter("*long*")) == []


def test_fork_and_its_staging_survive_an_outage_that_is_longer_than_results_are_kept(
    own_scheduler: Scheduler, start_worker: StartWorker, large_source: Path, workdir: Path, mounts: Path
) -> None:
    # Given a chunked fork that is half done when its only worker is killed
    scheduler, staging = own_scheduler, StagingView(workdir, "long")
    worker = start_worker(mounts, env=ENVIRONMENT)
    scheduler.send({"source": str(large_source), "destination": str(workdir / "fork")}, "long")
    with stopped_in_the_middle(worker, staging):
        worker.kill()

    # When no worker runs for three days, and its messages are lost
    advance_ttls(scheduler.redis, THREE_DAYS)
    staging.backdate()
    context = Context(Roots((str(workdir),)), Limits(), scheduler.results, lambda task, kwargs, task_id: None, QUEUE)
    remove_abandoned(context)

    # Then its staging exists, and a worker ends it
    assert staging.is_in_the_middle()
    assert scheduler.results.states.get("long")["status"] in ("STARTED", "PROGRESS")
    start_worker(mounts, env=ENVIRONMENT)
    wait_until(lambda: scheduler.results.states.get("long")["status"] == "SUCCESS", "the end", 60)
    assert_alike(large_source, workdir / "fork", SKIPPED_BY_DEFAULT)
    files = scheduler.files("long")
    result = scheduler.results.final.fork("long")
    assert result is not None
    assert len(files) == result["files"]["total"]
    scheduler.wait_quiet()
    advance_ttls(scheduler.redis, EXPIRES)
    assert [key for key in scheduler.redis.scan_iter("*long*") if b":losses" not in key] == []


def test_cancellation_survives_an_outage_and_a_late_one_does_not_affect_later_jobs(
    own_scheduler: Scheduler, start_worker: StartWorker, mounts: Path, source: Path, fresh: Fresh
) -> None:
    scheduler, workdir = own_scheduler, fresh("xfs")
    request = {"source": str(source), "destination": str(workdir / "fork")}

    # Given a fork that was cancelled before a worker took it
    sent = scheduler.send(request, "early")
    scheduler.results.cancellations.request("early")
    advance_ttls(scheduler.redis, THREE_DAYS)
    start_worker(mounts, env=ENVIRONMENT)
    scheduler.wait_failed(sent)
    assert str(sent.state) == "REVOKED"
    assert not (workdir / "fork").exists()

    # When it is cancelled again after its end, and its result has expired
    scheduler.results.cancellations.request("early")
    advance_ttls(scheduler.redis, EXPIRES)

    # Then the id is free
    assert scheduler.results.final.get("early") is None
    scheduler.send(request, "early")  # the subscription of Celery's wait may still contain the first end
    wait_until(lambda: scheduler.results.final.get("early") is not None, "the end")
    result = scheduler.results.final.fork("early")
    assert result is not None
    assert (result["status"], result["error"]) == ("succeeded", None)


def test_campaign_under_the_id_of_an_earlier_one_has_none_of_its_results(
    own_scheduler: Scheduler, start_worker: StartWorker, mounts: Path, source: Path, fresh: Fresh
) -> None:
    # Given a campaign with failures, whose claim and result Redis has lost
    scheduler, workdir = own_scheduler, fresh("xfs")
    start_worker(mounts, env=ENVIRONMENT)
    for n in (1, 2, 3):
        (workdir / f"vm-{n:04}").mkdir()
    assert send(scheduler, request_of(source, workdir, 30), "again").get(timeout=30)["status"] == "partial"
    scheduler.wait_quiet()  # another message of its end may be on its way
    scheduler.redis.delete("forkvm:again:claim", "forkvm:again:result", "celery-task-meta-again")
    for n in (1, 2, 3):
        (workdir / f"vm-{n:04}").rmdir()

    # When a campaign with the same id starts and ends before it has made any fork
    send(scheduler, request_of(workdir / "missing", workdir, 30), "again")
    wait_until(lambda: scheduler.results.final.get("again") is not None, "the end")
    scheduler.wait_quiet()

    # Then its result contains only its own failures
    result = result_of(scheduler, "again")
    assert result["forks"] == {"total": 30, "succeeded": 0, "failed": 30, "cancelled": 0}
    forks = forks_of(scheduler, "again", 30)
    assert {fork["error"]["code"] for fork in forks if fork["error"]} == {"source_not_found"}
    assert len(forks) == len(result["failures"]) == 30
