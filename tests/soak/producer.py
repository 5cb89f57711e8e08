"""The client of a soak: sends jobs, cancels some, and checks those that have ended."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from celery import Celery
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from tests.soak.final_checks import FinalChecks
from tests.soak.jobs import KINDS, Job, Kind, Sources

#: Jobs in flight at once.
OPEN_JOBS = 12


class Producer:
    """A client that keeps `OPEN_JOBS` jobs in flight, and sends a request again that Redis did not accept."""

    def __init__(
        self,
        app: Celery,
        checks: FinalChecks,
        sources: Sources,
        workdirs: tuple[Path, Path],
        seed: int,
        kinds: Sequence[Kind] = KINDS,
    ) -> None:
        self._app = app
        self._checks = checks
        self._sources = sources
        self._places = workdirs
        self._rng = random.Random(seed)
        self._kinds = kinds
        self.jobs: list[Job] = []
        self.open: list[Job] = []
        self._cancels: dict[str, tuple[float, Job]] = {}

    def produce(self) -> None:
        """Check the jobs that have ended, and send new ones."""
        with suppress(OperationalError, RedisError):
            self.close_ended()
            self._cancel_some()
            while len(self.open) < OPEN_JOBS:
                job = self._rng.choice(self._kinds)(self._sources, *self._places, f"job-{len(self.jobs)}", self._rng)
                self.jobs.append(job)
                self.open.append(job)
                for _ in range(job.copies):
                    self.send(job)
                if job.cancel_after is not None:
                    self._cancels[job.fork_id] = time.monotonic() + job.cancel_after, job

    def close_ended(self) -> None:
        """Check the jobs that have ended."""
        for job in list(self.open):
            if self._checks.close(job):
                self.open.remove(job)

    def send(self, job: Job) -> None:
        """Send a job, repeatedly until Redis accepts it."""
        while True:
            try:
                self._app.send_task(
                    job.task,
                    kwargs={"request": job.request},
                    task_id=job.fork_id,
                    queue="forkvm",
                    retry=False,
                    **job.options,
                )
                job.sent += 1
                return
            except (OperationalError, RedisError, OSError):
                time.sleep(0.1)

    def send_unknown_again(self) -> None:
        """Send those jobs again that no worker has claimed: Redis lost their messages."""
        for job in self.open:
            if self._checks.scheduler.results.claims.get(job.fork_id) is None:
                self.send(job)

    def damageable(self) -> list[Job]:
        """The jobs in flight whose staging may be damaged."""
        return [job for job in list(self.open) if job.may_be_damaged]

    def _cancel_some(self) -> None:
        for fork_id, (when, job) in list(self._cancels.items()):
            if time.monotonic() > when:
                if job.cancel_by == "cancel":
                    self._checks.scheduler.results.cancellations.request(fork_id)
                else:
                    self._app.control.revoke(fork_id, terminate=job.cancel_by == "terminate")
                del self._cancels[fork_id]
