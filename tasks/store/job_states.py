"""Celery's record of each job: its state, the progress while it runs, and the result at its end."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from celery import states
from redis.client import Pipeline

from tasks.copier.progress import Progress
from tasks.store import keys
from tasks.store.connection import Connection, decoded

#: Celery's final state for each status of a ForkResult.
FINAL_STATES = {"succeeded": states.SUCCESS, "failed": states.FAILURE, "cancelled": states.REVOKED}


@dataclass(frozen=True)
class JobStates:
    """The states of all jobs. Each method raises RedisError; none waits while Redis is away."""

    connection: Connection

    def get(self, job_id: str) -> dict[str, Any]:
        """Celery's record of a job: `status`, `result` …; PENDING where there is none."""
        record = decoded(self.connection.redis.get(self.connection.state_key(job_id)))
        return record or {"status": states.PENDING, "result": None}

    def publish_progress(self, fork_id: str, part: str, progress: Progress) -> None:
        """Publish the state PROGRESS of a fork: the sums over all its parts. Never replaces a final state."""
        parts = keys.PROGRESS.of(fork_id)
        with self.connection.redis.pipeline(transaction=True) as pipe:
            pipe.hset(parts, part, json.dumps([progress["files_done"], progress["bytes_done"]]))
            pipe.expire(parts, self.connection.open_expires)
            pipe.execute()

        def sums(pipe: Pipeline) -> Progress:
            counts = [json.loads(value) for value in cast("list[bytes]", pipe.hvals(parts))]
            files, count = sum(f for f, _ in counts), sum(b for _, b in counts)
            return {**progress, "files_done": files, "bytes_done": count}

        self.publish(fork_id, sums)

    def publish(self, job_id: str, read: Callable[[Pipeline], Mapping[str, Any]]) -> None:
        """Publish the state PROGRESS of a job with the progress that `read` returns. Never replaces a final state."""
        key = self.connection.state_key(job_id)

        def update(pipe: Pipeline) -> None:
            current = decoded(pipe.get(key))
            # Read after the state: when another process writes the state in between, redis-py calls this again, so
            # the sums never go back.
            progress = read(pipe)
            pipe.multi()
            if not is_final(current):
                record = state_json(job_id, "PROGRESS", json.dumps(progress))
                pipe.set(key, record, ex=self.connection.open_expires)
                pipe.publish(key, record)

        self.connection.redis.transaction(update, key)


def state_json(job_id: str, status: str, result: str) -> str:
    """A record as Celery's Redis backend writes it; `result` is JSON."""
    return (
        f'{{"status":"{status}","result":{result},"traceback":null,"children":[],"date_done":null,'
        f'"task_id":{json.dumps(job_id)}}}'
    )


def final_state(result: Mapping[str, Any]) -> str:
    """Celery's final state of a fork or campaign with this result.

    A campaign succeeds also where forks failed. It fails only where it was given up as a whole.
    """
    if "campaign_id" in result and (result["status"] == "partial" or result["error"] is None):
        return states.SUCCESS
    return FINAL_STATES[result["status"]]


def is_final(record: Mapping[str, Any] | None) -> bool:
    """Whether this is Celery's record of a job that has ended."""
    return record is not None and record["status"] in states.READY_STATES
