"""What a domain does at this moment: its queues, its jobs, its workers.

Everything is asked for when it is needed: Redis for queues and jobs, each worker for itself. A worker that does not
answer is known by the record that it wrote last.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, cast

from celery import Celery
from redis import Redis

from tasks.names import inner_queues
from tasks.store.queues import lists_of, unacked_messages, waiting_messages
from tasks.store.results import Results
from tasks.store.workers import Seen, Workers
from worker.runtime.configuration import UNACKED_KEY
from worker.runtime.remote_control import STATS_FIELD

#: Time that workers have to answer, in seconds. Each answers within milliseconds, but their number is unknown.
ANSWER_SECONDS = 1.0
#: So many messages at the end of a queue that is taken from next are searched for the oldest.
_OLDEST_AMONG = 10
#: The most jobs that are listed.
MOST_JOBS = 100


@dataclass(frozen=True)
class Queue:
    """One queue of the domain."""

    name: str
    #: Messages that no worker has taken.
    waiting: int
    #: Messages that workers have taken and not finished.
    unacked: int
    #: How long the oldest waiting message has waited by its header `sent_at`, in seconds; None without one.
    oldest_seconds: float | None


@dataclass(frozen=True)
class Job:
    """One fork or campaign that a worker has started and that has not ended."""

    id: str
    kind: Literal["fork", "campaign"]
    #: STARTED or PROGRESS.
    state: str
    #: The contract's progress; None before the first is published.
    progress: dict[str, Any] | None
    destination: str


@dataclass(frozen=True)
class Worker:
    """One worker that answered, or that has a record and did not answer."""

    name: str
    version: str
    queues: list[str]
    #: Of one that does not answer: the number in its record.
    children: int
    #: The number of children with a task; None if the worker does not answer.
    busy: int | None
    #: How long ago its consumer loop was well, in seconds. One that answers renewed its leases then, which it does
    #: every 2 s. One that does not answer wrote its record then, which it does every 10 s.
    heartbeat_seconds: float
    #: By its record; None without one, as of a worker of an earlier version.
    host: str | None = None
    answers: bool = True
    #: Whether it was told to end when it was heard of last. It answers no more, finishes its running tasks, and ends.
    ending: bool = False

    @property
    def idle(self) -> int | None:
        """The number of children without a task; None if the worker does not answer."""
        return None if self.busy is None else max(0, self.children - self.busy)


@dataclass(frozen=True)
class Overview:
    """One domain at one moment."""

    queue: str
    queues: list[Queue]
    forks: int
    campaigns: int
    #: The first `MOST_JOBS` jobs.
    jobs: list[Job]
    workers: list[Worker]

    @property
    def answering(self) -> list[Worker]:
        """The workers that answered."""
        return [worker for worker in self.workers if worker.answers]

    @property
    def silent(self) -> list[Worker]:
        """The workers that did not."""
        return [worker for worker in self.workers if not worker.answers]

    def to_data(self) -> dict[str, Any]:
        """JSON-ready data."""
        workers = [{**vars(worker), "idle": worker.idle} for worker in self.workers]
        return {**vars(self), "queues": [*map(vars, self.queues)], "jobs": [*map(vars, self.jobs)], "workers": workers}


def read_overview(app: Celery, results: Results, queue: str) -> Overview:
    """The overview of the domain whose clients use `queue`. Takes `ANSWER_SECONDS`.

    Raises RedisError, OperationalError.
    """
    with app.connection_for_read() as connection:
        channel: Any = connection.default_channel
        queues = _queues(channel.client, [queue, *inner_queues(queue)])
    jobs = results.open_jobs.of_queue(queue)
    campaigns = sum(bool(job.claim.get("campaign")) for job in jobs)
    return Overview(
        queue=queue,
        queues=queues,
        forks=len(jobs) - campaigns,
        campaigns=campaigns,
        jobs=[_job(results, job.job_id, job.claim) for job in jobs[:MOST_JOBS]],
        workers=_workers(app, results.workers, queue),
    )


def _queues(redis: Redis, names: list[str]) -> list[Queue]:
    waiting = waiting_messages(redis, names)
    unacked = unacked_messages(redis, UNACKED_KEY, names)
    with redis.pipeline(transaction=False) as pipe:
        for name in names:
            for each in lists_of(name):
                pipe.lrange(each, -_OLDEST_AMONG, -1)  # messages are taken from the right
        next_ones = iter(pipe.execute())
    now = time.time()
    return [
        Queue(name, waiting[name], unacked[name], _oldest(chain(*(next(next_ones) for _ in lists_of(name))), now))
        for name in names
    ]


def _oldest(messages: Iterable[bytes], now: float) -> float | None:
    ages = [now - sent_at for message in messages if (sent_at := _sent_at(message)) is not None]
    return max(0.0, *ages) if ages else None


def _sent_at(message: bytes) -> float | None:
    """The header `sent_at` of a message, in seconds since the epoch; None if it has none."""
    try:
        found = json.loads(message)["headers"]["sent_at"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return found if isinstance(found, int | float) else None


def _job(results: Results, job_id: str, claim: Mapping[str, Any]) -> Job:
    record = results.states.get(job_id)
    progress = record["result"] if record["status"] == "PROGRESS" else None
    kind: Literal["fork", "campaign"] = "campaign" if claim.get("campaign") else "fork"
    return Job(job_id, kind, record["status"], progress, str(claim["destination"]))


def _workers(app: Celery, records: Workers, queue: str) -> list[Worker]:
    """The workers that serve `queue`. Celery's workers of other applications answer too."""
    before = records.seen()
    answers = cast("dict[str, dict[str, Any]]", app.control.inspect(timeout=ANSWER_SECONDS).stats() or {})
    found = [
        Worker(name=name, **stats[STATS_FIELD], host=before[name].record.host if name in before else None)
        for name, stats in answers.items()
        if STATS_FIELD in stats
    ]
    missing = before.keys() - {worker.name for worker in found}
    if missing:
        # One that ended meanwhile removed its record. One that started meanwhile had none.
        after = records.seen()
        found += [_silent(after[name]) for name in missing if name in after]
    return sorted((worker for worker in found if queue in worker.queues), key=lambda worker: worker.name)


def _silent(seen: Seen) -> Worker:
    """A worker that did not answer."""
    record = seen.record
    return Worker(
        name=record.name,
        version=record.version,
        queues=record.queues,
        children=record.children,
        busy=None,
        heartbeat_seconds=round(seen.age, 3),
        host=record.host,
        answers=False,
        ending=record.ending,
    )
