"""Celery's record of each job: its state, the progress while it runs, and the result at its end."""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, cast

from celery import states
from redis.client import Pipeline
from redis.exceptions import OutOfMemoryError

from tasks.copier.errors import describe
from tasks.copier.progress import Progress
from tasks.store import keys, lua
from tasks.store.connection import Connection, decoded

#: Celery's final state for each status of a ForkResult.
FINAL_STATES = {"succeeded": states.SUCCESS, "failed": states.FAILURE, "cancelled": states.REVOKED}
#: All of Celery's final states, for the Lua scripts: words with a space before and after each.
READY_STATES = f" {' '.join(sorted(states.READY_STATES))} "
#: The exceptions of tasks that did not succeed, as Celery writes them.
_RAISED = {
    "failed": {"exc_type": "ForkFailed", "exc_module": "tasks.contract"},
    "cancelled": {"exc_type": "TaskRevokedError", "exc_module": "celery.exceptions"},
}


@dataclass(frozen=True)
class JobStates:
    """The states of all jobs. Each method raises RedisError; none but `publish_final` waits while Redis is away."""

    connection: Connection

    def get(self, job_id: str) -> dict[str, Any]:
        """Celery's record of a job: `status`, `result` …; PENDING where there is none."""
        record = decoded(self.connection.redis.get(self.connection.state_key(job_id)))
        return record or {"status": states.PENDING, "result": None}

    def publish_started(self, job_id: str) -> None:
        """Publish the state STARTED of a job. Never replaces a final state."""
        self._set([(job_id, state_json(job_id, states.STARTED, "null"), "")], self.connection.open_expires)

    def publish_final(self, job_id: str, result: Mapping[str, Any]) -> None:
        """Publish the final state of a job with this result, as Celery does at the end of a task.

        A patient connection waits also while Redis is away or full.
        """
        self.publish_all_final({job_id: result})

    def publish_all_final(self, results: Mapping[str, Mapping[str, Any]], ended: Container[str] = ()) -> None:
        """As `publish_final`, for several jobs in one command. No sweep has to look at those that are `ended`, too."""
        records = [
            (job_id, final_record(job_id, result, json.dumps(result), now_json()), job_id if job_id in ended else "")
            for job_id, result in results.items()
        ]
        self.connection.ask(lambda: self._set(records, self.connection.expires), OutOfMemoryError)

    def _set(self, records: list[tuple[str, str, str]], ttl: int) -> None:
        """Store and publish states: of each job its id, its record, and its id again if it is no longer open."""
        lua.SET_STATE.run(
            self.connection.redis,
            open_key=keys.OPEN.pattern,
            ttl=ttl,
            final_states=READY_STATES,
            more_keys=[self.connection.state_key(job_id) for job_id, *_ in records],
            more_args=[value for _, *values in records for value in values],
        )

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


def state_json(job_id: str, status: str, result: str, date_done: str = "null") -> str:
    """A record as Celery's Redis backend writes it; `result` and `date_done` are JSON."""
    return (
        f'{{"status":"{status}","result":{result},"traceback":null,"children":[],"date_done":{date_done},'
        f'"task_id":{json.dumps(job_id)}}}'
    )


def now_json() -> str:
    """The present time as Celery writes it into a record, as JSON."""
    return f'"{datetime.now(UTC).isoformat()}"'


def final_record(job_id: str, result: Mapping[str, Any], text: str, date_done: str = "null") -> str:
    """The record of a job that has ended; `text` is its result as JSON."""
    state = final_state(result)
    if state != states.SUCCESS:
        text = _raised(result["status"], describe(result["error"]))
    return state_json(job_id, state, text, date_done)


@lru_cache(maxsize=16)  # a cancelled campaign ends thousands of forks with the same message
def _raised(status: str, message: str) -> str:
    """The exception in the record of a job that did not succeed, as JSON."""
    return json.dumps({**_RAISED[status], "exc_message": [message]})


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
