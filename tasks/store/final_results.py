"""The final results of forks and campaigns."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar, cast

from celery import states
from redis.exceptions import OutOfMemoryError

from tasks.copier.fork_spec import ForkResult
from tasks.copier.progress import Cancellation
from tasks.store import keys, lua
from tasks.store.connection import Connection

Result = TypeVar("Result", bound=Mapping[str, Any])


class ForkStatus(NamedTuple):
    """The final result of a fork, or None before its end; and whether its cancellation was requested."""

    result: ForkResult | None
    cancellation: Cancellation


@dataclass(frozen=True)
class Ended(Generic[Result]):
    """The end of a job, as it is stored."""

    #: The result: the one that was to be stored, or an earlier one.
    result: Result
    #: Whether tasks are to be sent after the job; None if that is not known, because another process ended it.
    has_followers: bool | None


@dataclass(frozen=True)
class FinalResults:
    """The final results of all jobs. Each method raises RedisError."""

    connection: Connection

    def fork(self, fork_id: str) -> ForkResult | None:
        """The final ForkResult, or None before the fork has ended."""
        return cast("ForkResult | None", self.get(fork_id))

    def get(self, job_id: str) -> dict[str, Any] | None:
        """The final result of a fork or campaign, or None before its end."""
        return self.get_many([job_id])[0]

    def get_many(self, job_ids: list[str]) -> list[dict[str, Any] | None]:
        """As `get`, for many jobs in one command."""
        wanted = [key for job_id in job_ids for key in (keys.RESULT.of(job_id), self.connection.state_key(job_id))]
        found = iter(self.connection.read_all(wanted))
        return [final_result(stored, record) for stored, record in zip(found, found, strict=True)]

    def status(self, fork_id: str) -> ForkStatus:
        """The result of a fork and whether its cancellation was requested, read in one command."""
        wanted = [keys.RESULT.of(fork_id), self.connection.state_key(fork_id), keys.CANCEL.of(fork_id)]
        stored, record, flag = self.connection.read_all(wanted)
        return ForkStatus(cast("ForkResult | None", final_result(stored, record)), Cancellation.of(flag is not None))

    def store(self, job_id: str, result: Result) -> Ended[Result]:
        """Store the final result; all keys of the job then expire with it.

        A result that another process has stored stays. A patient connection waits also while Redis is full: the job has
        ended, and that must not be lost.
        """
        return self.store_all({job_id: result})[0]

    def store_all(self, results: Mapping[str, Result]) -> list[Ended[Result]]:
        """As `store`, for several jobs in one command; results by the job's id."""
        connection = self.connection
        answers = connection.ask(
            lambda: lua.STORE_RESULT.run(
                connection.redis,
                ttl=connection.expires,
                usual=keys.USUAL_OF_JOB,
                names=keys.OTHERS_OF_JOB,
                more_keys=[key.of(job_id) for job_id in results for key in (keys.RESULT, keys.CANVAS)],
                more_args=[
                    value
                    for job_id, result in results.items()
                    for value in (json.dumps(result), keys.prefix_of(job_id))
                ],
            ),
            OutOfMemoryError,
        )
        return [_ended(result, answer) for result, answer in zip(results.values(), answers, strict=True)]


def _ended(result: Result, answer: int | bytes) -> Ended[Result]:
    """The end of a job that was to have this result, from the answer of a script."""
    return Ended(result, bool(answer)) if isinstance(answer, int) else Ended(json.loads(answer), None)


def final_result(stored: dict[str, Any] | None, record: dict[str, Any] | None) -> dict[str, Any] | None:
    """The final result, from what is stored as such and from Celery's record; None where neither has it.

    A campaign's fork that succeeded has its result only in Celery's record. The record may also be that of another
    task with this id, an estimate or one of another application.
    """
    if stored is None and record is not None and record["status"] == states.SUCCESS:
        result = record["result"]
        return result if _is_of_job(result) else None
    return stored


def _is_of_job(result: Any) -> bool:
    """Whether it is the result of a fork or campaign."""
    if not isinstance(result, dict) or not {"status", "error"} <= result.keys():
        return False
    return "fork_id" in result or "campaign_id" in result
