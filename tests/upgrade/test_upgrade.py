"""Workers of the earlier and of this version serve one queue and one filesystem during an upgrade.

Nothing is lost, every result is right, and each version reads what the other wrote: messages, Redis and staging.
"""

from __future__ import annotations

import json
import random
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.fixtures.filesystems import Fresh
from tests.fixtures.processes import forkvm_script, program_environment, wait_until
from tests.soak.final_checks import FinalChecks
from tests.soak.jobs import UNDAMAGED_KINDS, make_sources
from tests.soak.producer import Producer
from tests.support.guests import make_slow_file
from tests.support.system import queued_campaigns as campaigns
from tests.support.system.result_checks import check_file_results, check_fork_result
from tests.support.system.scheduler import Scheduler
from tests.support.system.staging_view import StagingView, leftovers
from tests.support.system.systems import stopped_in_the_middle
from tests.support.tree import snapshot
from tests.upgrade import options
from tests.upgrade.conftest import StartVersion, Version
from tests.upgrade.killing import Workers

#: Seconds for all jobs to end after the last worker was killed.
TIMEOUT = 120.0
#: Forks of the campaign that one version begins.
FORKS = 400


@pytest.mark.parametrize(("first", "second"), [("earlier", "this"), ("this", "earlier")])
def test_one_version_finishes_jobs_that_the_other_started(
    first: Version,
    second: Version,
    start_version: StartVersion,
    own_scheduler: Scheduler,
    earlier_forkvm: Path,
    fresh: Fresh,
) -> None:
    # Given a fork in chunks and a campaign, both half done when the only worker is killed
    workdir, campaign_workdir = fresh("xfs_noreflink"), fresh("xfs")
    source, campaign_source = workdir / "source", campaigns.make_source(campaign_workdir / "source", files=3)
    source.mkdir()
    for n in range(2):
        make_slow_file(source / f"disk-{n}", extents=8_000)
    worker = start_version(first)
    own_scheduler.send({"source": str(source), "destination": str(workdir / "fork")}, "f1")
    campaigns.send(own_scheduler, campaigns.request_of(campaign_source, campaign_workdir, FORKS), "c1")
    with stopped_in_the_middle(
        worker, StagingView(workdir, "f1"), lambda: 0 < campaigns.done(own_scheduler, "c1") < FORKS
    ):
        worker.kill()

    # When
    start_version(second)

    # Then
    for job in ("f1", "c1"):
        wait_until(lambda job=job: own_scheduler.results.final.get(job) is not None, f"the end of {job}", TIMEOUT)  # type: ignore[misc]
    own_scheduler.wait_quiet()
    fork = own_scheduler.results.final.fork("f1")
    assert fork is not None
    check_fork_result(fork)
    check_file_results(fork, own_scheduler.files("f1"))
    assert fork["error"] is None
    assert snapshot(workdir / "fork") == snapshot(source)
    paths = campaigns.paths_of(campaign_workdir, FORKS)
    campaigns.assert_all_are_whole(own_scheduler, campaigns.result_of(own_scheduler, "c1"), campaign_source, paths)
    assert leftovers(workdir) + leftovers(campaign_workdir) == []
    for command in ("status f1 --json", "files f1 --json", "status c1 --json", "forks c1 --json"):
        both = [_printed(program, command, own_scheduler) for program in (str(earlier_forkvm), forkvm_script())]
        assert both[0] == both[1]
        assert both[0]


@pytest.mark.long
@pytest.mark.timeout(options.seconds() + 300)
def test_no_job_is_lost_while_workers_of_both_versions_are_killed(
    start_version: StartVersion, own_scheduler: Scheduler, fresh: Fresh
) -> None:
    # Given
    seed, seconds = options.seed(), options.seconds()
    workdirs = fresh("xfs"), fresh("xfs_noreflink")
    checks = FinalChecks(own_scheduler)
    producer = Producer(own_scheduler.app, checks, make_sources(*workdirs), workdirs, seed, UNDAMAGED_KINDS)
    workers = Workers(start_version, random.Random(seed + 1))

    # When
    with ThreadPoolExecutor(1) as executor:
        killing = executor.submit(workers.kill_until, time.monotonic() + seconds)
        while not killing.done():
            producer.produce()
            time.sleep(0.1)
        killing.result()

    # Then
    end = time.monotonic() + TIMEOUT
    while producer.open and time.monotonic() < end:
        producer.close_ended()
        if not any(own_scheduler.messages().values()):
            producer.send_unknown_again()  # see "What is not guaranteed" in docs/reliability.md
        time.sleep(0.5)
    assert [(job.fork_id, job.kind) for job in producer.open] == []
    own_scheduler.wait_quiet()
    checks.check_end(producer.jobs)
    wait_until(lambda: not any(map(leftovers, workdirs)), f"the removal of all staging: {[*map(leftovers, workdirs)]}")
    assert workers.all_run()
    taken = workers.jobs_taken()
    shared = set(taken["earlier"]) & set(taken["this"])
    assert shared, "no job was served by workers of both versions"
    _report(producer, checks, workers)


def _printed(program: str, command: str, scheduler: Scheduler) -> list[object]:
    """The JSON documents that a command of either version prints."""
    environment = program_environment(scheduler.server)
    done = subprocess.run(
        [program, *command.split()], cwd="/", env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def _report(producer: Producer, checks: FinalChecks, workers: Workers) -> None:
    taken = workers.jobs_taken()
    shared = set(taken["earlier"]) & set(taken["this"])
    forks = sum(len(job.destinations) for job in producer.jobs)
    print(f"\nupgrade: seed {options.seed()}, {options.seconds()} s: {len(producer.jobs)} jobs with {forks} forks")
    print(f"  ends: {', '.join(f'{count} {end}' for end, count in checks.ends.most_common())}")
    for version, jobs in taken.items():
        print(f"  {version} version: {jobs.total()} tasks of {len(jobs)} jobs")
    print(f"  served by both versions: {len(shared)} jobs")
    lost = sum(job.sent > job.copies for job in producer.jobs)
    print(f"  sent again by the client, never begun by a worker: {lost}")
    print(f"  faults: {', '.join(f'{count} {fault}' for fault, count in workers.faults.most_common())}")
