"""The soak itself; in a run of all tests it takes a minute."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from celery import Celery
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from tests.fixtures.filesystems import Fresh
from tests.fixtures.processes import StartWorker, Worker, celery_client, wait_until
from tests.fixtures.redis_server import RedisServer
from tests.soak import plan
from tests.soak.books import Books
from tests.soak.faults import Faults
from tests.soak.jobs import KINDS, Job, Sources, make_sources
from tests.system.scheduler import Scheduler
from tests.system.staging import leftovers

#: Jobs that are on their way at once, and seconds for all to end when no fault strikes any more.
OPEN_JOBS = 12
PATIENCE = 120.0
LIMITS = {
    "FORKVM_INLINE_FILES": "10",
    "FORKVM_INLINE_BYTES": "1048576",
    "FORKVM_CHUNK_FILES": "20",
    "FORKVM_CHUNK_BYTES": "2097152",
    "FORKVM_VISIBILITY_TIMEOUT": "5",
}


class Producer:
    """Keeps some jobs on their way, as a client does that sends again what Redis did not take."""

    def __init__(self, app: Celery, books: Books, sources: Sources, places: tuple[Path, Path], seed: int) -> None:
        self._app = app
        self._books = books
        self._sources = sources
        self._places = places
        self._dice = random.Random(seed)
        self.jobs: list[Job] = []
        self.open: list[Job] = []
        self._cancels: dict[str, float] = {}

    def produce(self) -> None:
        """Close what has ended, and send as many anew."""
        with suppress(RedisError):
            self.close_ended()
            self._cancel_some()
            while len(self.open) < OPEN_JOBS:
                job = self._dice.choice(KINDS)(self._sources, *self._places, f"job-{len(self.jobs)}", self._dice)
                self.jobs.append(job)
                self.open.append(job)
                for _ in range(job.copies):
                    self.send(job)
                if job.cancel_after is not None:
                    self._cancels[job.fork_id] = time.monotonic() + job.cancel_after

    def close_ended(self) -> None:
        """Close the books of what has ended."""
        for job in list(self.open):
            if self._books.close(job):
                self.open.remove(job)

    def send(self, job: Job) -> None:
        """Sends it until Redis has taken it."""
        while True:
            try:
                self._app.send_task(
                    job.task, kwargs={"request": job.request}, task_id=job.fork_id, queue="forkvm", retry=False
                )
                job.sent += 1
                return
            except (OperationalError, RedisError, OSError):
                time.sleep(0.1)

    def send_unknown_again(self) -> None:
        """What no worker has ever begun with was lost on its way: its client sends it again."""
        for job in self.open:
            if self._books.scheduler.results.claim_of(job.fork_id) is None:
                self.send(job)

    def _cancel_some(self) -> None:
        for fork_id, when in list(self._cancels.items()):
            if time.monotonic() > when:
                self._books.scheduler.results.cancel(fork_id)
                del self._cancels[fork_id]


@contextmanager
def _in_background(faults: Faults, dice: random.Random, until: float) -> Iterator[list[BaseException]]:
    failures: list[BaseException] = []

    def strike() -> None:
        try:
            while time.monotonic() < until:
                faults.strike()
                time.sleep(dice.uniform(0.2, 2.0))
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=strike)
    thread.start()
    try:
        yield failures
    finally:
        thread.join()


@pytest.mark.alone
@pytest.mark.timeout(plan.seconds() + 240)
def test_every_job_has_one_true_end_whatever_strikes(
    redis_server: RedisServer, start_worker: StartWorker, mounts: Path, fresh: Fresh
) -> None:
    seed, seconds = plan.seed(), plan.seconds()
    places = fresh("xfs"), fresh("xfs_noreflink")
    sources = make_sources(*places)

    def start() -> Worker:
        return start_worker(mounts, env=LIMITS, args=["--without-mingle"])

    with celery_client(redis_server) as app:
        scheduler = Scheduler(app, redis_server)
        books = Books(scheduler)
        producer = Producer(app, books, sources, places, seed)
        faults = Faults(redis_server, start, random.Random(seed + 1))
        until = time.monotonic() + seconds

        # When
        with _in_background(faults, random.Random(seed + 2), until) as failures:
            while time.monotonic() < until and not failures:
                producer.produce()
                books.measure([pid for worker in faults.workers for pid in (worker.pid, *worker.children)])
                time.sleep(0.1)
        assert failures == []

        # Then
        end = time.monotonic() + PATIENCE
        while producer.open and time.monotonic() < end:
            producer.close_ended()
            if not any(scheduler.messages().values()):
                producer.send_unknown_again()
            time.sleep(0.5)
        assert [job.fork_id for job in producer.open] == []
        scheduler.wait_quiet()
        wait_until(lambda: not any(map(leftovers, places)), f"the end of all staging: {[*map(leftovers, places)]}")
        books.check_end(producer.jobs)
        assert all(worker.running for worker in faults.workers)
        leaked = redis_server.leaked_keys()
        assert leaked == []
        _report(seed, seconds, producer, faults, books)
        scheduler.close()


def _report(seed: int, seconds: int, producer: Producer, faults: Faults, books: Books) -> None:
    jobs = producer.jobs
    sent, tries = sum(job.sent for job in jobs), faults.deliveries()
    print(f"\nsoak: seed {seed}, {seconds} s: {len(jobs)} jobs, {sent} requests sent, {tries} tries of tasks")
    print(f"  ends: {', '.join(f'{count} {end}' for end, count in books.ends.most_common())}")
    print(f"  faults: {faults.counts.total()}: {', '.join(f'{n} {fault}' for fault, n in faults.counts.most_common())}")
    lost = sum(job.sent > job.copies for job in jobs)
    print(f"  sent again by their clients, never begun: {lost}")
    print(f"  at most {books.most_files} open files and {books.most_memory >> 20} MiB in a process of a worker")
