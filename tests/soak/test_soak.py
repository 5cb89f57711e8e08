"""The soak itself; in a run of all tests it takes half a minute."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.fixtures.filesystems import Fresh
from tests.fixtures.processes import (
    StartWorker,
    Worker,
    celery_client,
    forkvm_script,
    program_environment,
    wait_until,
)
from tests.fixtures.redis_server import RedisServer
from tests.soak import plan
from tests.soak.damage import Damage
from tests.soak.faults import Faults
from tests.soak.final_checks import FinalChecks
from tests.soak.jobs import Job, make_sources
from tests.soak.other_application import other_application
from tests.soak.producer import Producer
from tests.soak.redis_faults import RedisFaults
from tests.support.system.redis_proxy import Proxy
from tests.support.system.scheduler import Scheduler
from tests.support.system.staging_view import leftovers

#: Seconds for all jobs to end after the last fault.
TIMEOUT = 120.0
LIMITS = {
    "FORKVM_INLINE_FILES": "10",
    "FORKVM_INLINE_BYTES": "1048576",
    "FORKVM_CHUNK_FILES": "20",
    "FORKVM_CHUNK_BYTES": "2097152",
    "FORKVM_VISIBILITY_TIMEOUT": "5",
}


@contextmanager
def _in_background(actions: Mapping[Callable[[], None], random.Random], until: float) -> Iterator[list[BaseException]]:
    """Call each function in `actions` repeatedly in a thread, with random pauses from its generator."""
    failures: list[BaseException] = []

    def repeat(inject: Callable[[], None], rng: random.Random) -> None:
        try:
            while time.monotonic() < until:
                inject()
                time.sleep(rng.uniform(0.2, 2.0))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=repeat, args=item) for item in actions.items()]
    for thread in threads:
        thread.start()
    try:
        yield failures
    finally:
        for thread in threads:
            thread.join()


@pytest.mark.long
@pytest.mark.timeout(plan.seconds() + 300)
def test_every_job_has_exactly_one_correct_result_under_random_faults(
    redis_server: RedisServer, start_worker: StartWorker, mounts: Path, fresh: Fresh, tmp_path: Path
) -> None:
    seed, seconds = plan.seed(), plan.seconds()
    workdirs = fresh("xfs"), fresh("xfs_noreflink")
    aside = tuple(workdir / "aside" for workdir in workdirs)
    for directory in aside:
        directory.mkdir()
    sources = make_sources(*workdirs)

    with (
        Proxy(redis_server.socket) as proxy,
        celery_client(redis_server) as app,
        other_application(tmp_path / "other", redis_server, random.Random(seed + 3)) as other,
    ):

        def start(number: int) -> Worker:
            """The second worker is behind the proxy."""
            address = f"redis+socket://{proxy.socket if number else redis_server.socket}"
            addresses = {"FORKVM_BROKER_URL": address, "FORKVM_RESULT_BACKEND": address}
            return start_worker(mounts, env=LIMITS | addresses)

        scheduler = Scheduler(app, redis_server)
        checks = FinalChecks(scheduler)
        producer = Producer(app, checks, sources, workdirs, seed)
        damage = Damage(producer.damageable, aside, random.Random(seed + 4))
        rng = random.Random(seed + 1)
        faults = Faults(start, RedisFaults(redis_server, proxy, rng), damage, rng)
        until = time.monotonic() + seconds

        # When
        actions = {faults.inject: random.Random(seed + 2), faults.damage: random.Random(seed + 5)}
        with _in_background(actions, until) as failures:
            while time.monotonic() < until and not failures:
                producer.produce()
                other.resume()
                checks.measure([pid for worker in faults.workers for pid in (worker.pid, *worker.children)])
                time.sleep(0.1)
        assert failures == []

        # Then
        _wait_until_all_have_ended(producer, scheduler)
        scheduler.wait_quiet()
        damage.clear()
        left_to_gc = _collect(redis_server, mounts, workdirs, producer.jobs)
        wait_until(
            lambda: not any(map(leftovers, workdirs)), f"the removal of all staging: {[*map(leftovers, workdirs)]}"
        )
        checks.check_end(producer.jobs)
        others = other.check(faults.of_redis)
        assert all(worker.running for worker in faults.workers)
        other.end()
        leaked = redis_server.leaked_keys()
        assert leaked == []
        _report(seed, seconds, producer, faults, checks)
        print(f"  {others}")
        print(f"  of damaged staging, left to gc: {left_to_gc}")
        scheduler.close()


def _wait_until_all_have_ended(producer: Producer, scheduler: Scheduler) -> None:
    end = time.monotonic() + TIMEOUT
    while producer.open and time.monotonic() < end:
        producer.close_ended()
        if not any(scheduler.messages().values()):
            producer.send_unknown_again()
        time.sleep(0.5)
    assert [(job.fork_id, job.kind) for job in producer.open] == []


def _collect(server: RedisServer, roots: Path, workdirs: tuple[Path, ...], jobs: list[Job]) -> int:
    """Have `forkvm gc` remove what is left of jobs that may have been damaged, and of no others.

    Returns how much that is.
    """
    damaged = tuple(job.control.name for job in jobs if job.may_be_damaged)
    left = [Path(path) for path in itertools.chain(*map(leftovers, workdirs)) if Path(path).name.startswith(damaged)]
    if not left:
        return 0
    for planted in itertools.chain.from_iterable(path.iterdir() for path in left if "." not in path.name[1:]):
        if not planted.is_file() or planted.is_symlink():
            planted.unlink()  # a FIFO or symlink planted by the soak; gc would keep the directory because of it
    for path in (*left, *(path / "lock" for path in left)):
        with suppress(FileNotFoundError, NotADirectoryError):
            os.utime(path, (86_400, 86_400))  # gc keeps staging that was made recently
    done = subprocess.run(
        [forkvm_script(), "gc", *map(str, workdirs)],
        env=program_environment(server, roots),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    print(done.stdout, done.stderr)
    assert done.returncode == 0, done.stdout + done.stderr
    return len(left)


def _report(seed: int, seconds: int, producer: Producer, faults: Faults, checks: FinalChecks) -> None:
    jobs = producer.jobs
    sent, tries = sum(job.sent for job in jobs), faults.deliveries()
    print(f"\nsoak: seed {seed}, {seconds} s: {len(jobs)} jobs, {sent} requests sent, {tries} tries of tasks")
    print(f"  ends: {', '.join(f'{count} {end}' for end, count in checks.ends.most_common())}")
    print(f"  faults: {faults.counts.total()}: {', '.join(f'{n} {fault}' for fault, n in faults.counts.most_common())}")
    lost = sum(job.sent > job.copies for job in jobs)
    print(f"  sent again by their clients, never begun: {lost}")
    print(f"  at most {checks.most_files} open files and {checks.most_memory >> 20} MiB in a process of a worker")
