"""The end of a job as it is stored: once, with Celery's final state."""

from __future__ import annotations

import json
from datetime import datetime

import fakeredis
import pytest

from tasks.copier.errors import Code, ForkError, cancelled
from tasks.copier.fork_spec import Clock, ForkResult, ForkSpec, failed, succeeded
from tasks.copier.progress import Cancellation
from tasks.copier.report import Totals
from tasks.store import keys
from tasks.store.results import Results

EXPIRES = 3600
STATE = "celery-task-meta-fork-1"


def _result(fork_id: str = "fork-1", *, cause: ForkError | None = None) -> ForkResult:
    spec = ForkSpec(fork_id=fork_id, source="/a", destination="/b")
    clock = Clock(spec.started)
    return failed(spec, cause, Totals(), 0, clock) if cause else succeeded(spec, Totals(), 0, clock)


@pytest.mark.parametrize(
    ("cause", "state", "stored"),
    [
        (None, "SUCCESS", None),
        (
            ForkError(Code.NO_SPACE, "it is full", "/b", 28),
            "FAILURE",
            {
                "exc_type": "ForkFailed",
                "exc_module": "tasks.contract",
                "exc_message": ["no_space: /b: it is full (ENOSPC)"],
            },
        ),
        (
            cancelled("/b"),
            "REVOKED",
            {
                "exc_type": "TaskRevokedError",
                "exc_module": "celery.exceptions",
                "exc_message": ["cancelled: /b: cancelled on request"],
            },
        ),
    ],
)
def test_the_final_state_is_published_as_celery_does(
    results: Results, redis: fakeredis.FakeRedis, cause: ForkError | None, state: str, stored: object
) -> None:
    result = _result(cause=cause)
    with redis.pubsub(ignore_subscribe_messages=True) as channel:  # type: ignore[no-untyped-call]
        channel.subscribe(STATE)
        channel.get_message()

        results.states.publish_final("fork-1", result)

        published = channel.get_message()
    record = results.states.get("fork-1")
    assert published is not None
    assert json.loads(published["data"]) == record
    assert (record["status"], record["task_id"]) == (state, "fork-1")
    assert record["result"] == (stored or result)
    assert datetime.fromisoformat(record["date_done"]).tzinfo is not None


def test_storing_the_result_does_not_replace_a_final_state(results: Results, redis: fakeredis.FakeRedis) -> None:
    redis.set(STATE, json.dumps({"status": "REVOKED", "result": None}), ex=EXPIRES)

    results.states.publish_final("fork-1", _result())

    assert results.states.get("fork-1")["status"] == "REVOKED"


def test_storing_a_result_returns_whether_the_job_has_callbacks(results: Results, redis: fakeredis.FakeRedis) -> None:
    redis.hset(keys.CANVAS.of("fork-2"), "digest", b"{}")
    redis.expire(keys.CANVAS.of("fork-2"), EXPIRES)

    assert results.final.store("fork-1", _result()).has_followers is False
    assert results.final.store("fork-2", _result("fork-2")).has_followers is True


def test_a_stored_result_is_not_replaced_and_a_later_process_gets_it(results: Results) -> None:
    """Two processes may end a fork at the same time if its staging cannot be locked."""
    first, second = _result(cause=ForkError(Code.IO_ERROR, "not usable", "/b")), _result()
    results.final.store("fork-1", first)

    later = results.final.store("fork-1", second)
    again = results.final.store("fork-1", first)  # the reply was lost, and the command is sent again

    assert (later.result, later.has_followers) == (first, None)
    assert (again.result, again.has_followers) == (first, False)
    assert results.final.fork("fork-1") == first
    assert results.pages.store_all({"fork-1": [b""]}) == [Cancellation.REQUESTED]
    assert results.pages.store("fork-1", {"0": [b""]}) is Cancellation.REQUESTED
