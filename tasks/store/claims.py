"""Claims on job ids: the first request that a worker starts under an id holds it until its result expires."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, NamedTuple, NotRequired, TypedDict, cast

from celery import states

from tasks.copier.errors import Code, ForkError, cancelled
from tasks.store import keys, lua
from tasks.store.connection import Connection, decoded
from tasks.store.final_results import final_result
from tasks.store.job_states import is_final, state_json

#: The heartbeat of a job that no sweep has seen yet.
NEVER_SEEN = -1


class Claim(TypedDict):
    """The request that holds an id, as it came; its destination; and the queue of its domain."""

    request: Any
    destination: str
    queue: str
    #: Whether it is a campaign. The destination is its home then.
    campaign: NotRequired[bool]


class ClaimOutcome(NamedTuple):
    """The request that holds an id, and the final result of its job, if that has ended."""

    holder: Claim
    result: dict[str, Any] | None
    #: Whether this call took the id: no worker has started the job before.
    is_new: bool = False
    #: The final state of an id whose result is not there: Celery set the state, or the state expires later.
    final_state: str | None = None


@dataclass(frozen=True)
class Claims:
    """The claims on all ids."""

    connection: Connection

    def take(self, job_id: str, claim: Claim) -> ClaimOutcome:
        """Take the id for a request, whose state is then STARTED; unless a request holds it, or its job has ended.

        Raises RedisError.
        """
        connection = self.connection
        state_key = connection.state_key(job_id)
        *found, is_new = connection.ask(
            lambda: lua.CLAIM.run(
                connection.redis,
                result_key=keys.RESULT.of(job_id),
                state_key=state_key,
                claim_key=keys.CLAIM.of(job_id),
                open_key=keys.OPEN.pattern,
                job_id=job_id,
                ttl=connection.open_expires,
                claim=json.dumps(claim),
                started=state_json(job_id, states.STARTED, "null"),
                never_seen=NEVER_SEEN,
                prefix=keys.prefix_of(job_id),
                earlier_names=keys.DELETE_WITH_CLAIM,
            )
        )
        stored, record, holder = map(decoded, found)
        result = final_result(stored, record)
        final_state = record["status"] if result is None and is_final(record) else None
        return ClaimOutcome(holder or claim, result, bool(is_new), final_state)

    def get(self, job_id: str) -> Claim | None:
        """The claim on an id; None before a worker has started the job. Raises RedisError."""
        return cast("Claim | None", self.connection.read(keys.CLAIM.of(job_id)))


def reason_not_to_start(outcome: ClaimOutcome, path: str, *, expired: bool) -> ForkError | None:
    """Why a job must not be started although its request holds the id; None if it may be.

    `expired`: the message's `expires` has passed. It counts only before a worker has started the job. `path` is the
    path of the error.
    """
    if outcome.final_state == states.REVOKED:
        return cancelled(path)
    if outcome.final_state is not None:
        return ForkError(Code.IO_ERROR, f"a task of this id ended as {outcome.final_state} before", path)
    if expired and outcome.is_new:
        return ForkError(Code.CANCELLED, "its message expired before a worker began with it", path)
    return None
