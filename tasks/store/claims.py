"""Claims on job ids: the first request that a worker starts under an id holds it until its result expires."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, NotRequired, TypedDict, cast

from celery import states

from tasks.copier.errors import Code, ForkError, cancelled
from tasks.copier.progress import Cancellation
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
    #: Whether the cancellation of the job was requested.
    cancellation: Cancellation = Cancellation.NOT_REQUESTED


@dataclass(frozen=True)
class Claims:
    """The claims on all ids."""

    connection: Connection

    def take(self, job_id: str, claim: Claim) -> ClaimOutcome:
        """Take the id for a request, whose state is then STARTED; unless a request holds it, or its job has ended.

        Raises RedisError.
        """
        return self.take_all({job_id: claim})[0]

    def take_all(self, claims: Mapping[str, Claim], *, started: bool = True) -> list[ClaimOutcome]:
        """As `take`, for several ids in one command. Without `started`, no state is stored.

        Raises RedisError.
        """
        connection = self.connection
        more_keys: list[str] = []
        more_args: list[str] = []
        for job_id, claim in claims.items():
            more_keys += (keys.RESULT.of(job_id), connection.state_key(job_id))
            more_keys += (keys.CLAIM.of(job_id), keys.CANCEL.of(job_id))
            record = state_json(job_id, states.STARTED, "null") if started else ""
            more_args += (job_id, json.dumps(claim), record, keys.prefix_of(job_id))
        answers = connection.ask(
            lambda: lua.CLAIM.run(
                connection.redis,
                open_key=keys.OPEN.pattern,
                ttl=connection.open_expires,
                never_seen=NEVER_SEEN,
                earlier_names=keys.DELETE_WITH_CLAIM,
                more_keys=more_keys,
                more_args=more_args,
            )
        )
        return [_outcome(claim, *answers[5 * n : 5 * n + 5]) for n, claim in enumerate(claims.values())]

    def get(self, job_id: str) -> Claim | None:
        """The claim on an id; None before a worker has started the job. Raises RedisError."""
        return cast("Claim | None", self.connection.read(keys.CLAIM.of(job_id)))


def _outcome(claim: Claim, stored: Any, state: Any, holder: Any, cancelled: Any, is_new: Any) -> ClaimOutcome:
    """What Redis answered about one id that was to be taken for `claim`."""
    record = decoded(state)
    result = final_result(decoded(stored), record)
    final_state = record["status"] if result is None and is_final(record) else None
    holder = claim if is_new else decoded(holder)
    return ClaimOutcome(holder or claim, result, bool(is_new), final_state, Cancellation.of(cancelled))


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
