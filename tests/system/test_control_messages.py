"""Remote control that would harm a worker: malformed messages, wrong arguments, commands for another application."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.fixtures.processes import wait_until
from tests.support.system.scheduler import Scheduler
from tests.support.system.systems import System

CHANNEL = "/0.celery.pidbox"
IGNORED = "a message of remote control or events is ignored"
SECRET = "a-guests-secret"


def _message(**fields: Any) -> str:
    properties = {"delivery_tag": "x", "delivery_info": {"exchange": "celery.pidbox"}, "body_encoding": None}
    message = {
        "body": json.dumps({"method": "ping", "arguments": {"token": SECRET}}),
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": {},
        "properties": properties,
    }
    return json.dumps(message | fields)


MALFORMED = {
    "a number": "1",
    "a list": "[]",
    "a text": '"x"',
    "no JSON": "{",
    "an empty object": "{}",
    "a list of properties": '{"body": "x", "properties": []}',
    "no delivery tag": _message(properties={"delivery_info": {}}),
    "pickle": _message(**{"content-type": "application/x-python-serialize"}),
    "no JSON in its body": _message(body=SECRET),
    "a number in its body": _message(body="5"),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_control_message_is_ignored(system: System, scheduler: Scheduler, kind: str) -> None:
    worker, before = system.worker, system.worker.output()

    scheduler.redis.publish(CHANNEL, MALFORMED[kind])

    worker.wait_for_output(IGNORED, before.count(IGNORED) + 1)
    assert scheduler.app.control.inspect(timeout=10, limit=1).ping()
    new = worker.output()[len(before) :]
    assert SECRET not in new
    assert "CRITICAL" not in new
    assert "Connection to broker lost" not in new


def _answer(scheduler: Scheduler, command: str, **arguments: Any) -> dict[str, str]:
    """The worker's answer to a command of Celery's remote control."""
    answers = scheduler.app.control.broadcast(command, arguments, reply=True, timeout=10, limit=1)
    ((answer,),) = (each.values() for each in answers or [])
    return dict(answer)


@pytest.mark.parametrize("queue", [5, ["a", "b"], None], ids=repr)
@pytest.mark.parametrize("command", ["add_consumer", "cancel_consumer"])
def test_a_queue_that_is_not_a_name_is_refused(system: System, scheduler: Scheduler, command: str, queue: Any) -> None:
    answer = _answer(scheduler, command, queue=queue)

    assert "the queue must be a name" in answer["error"]
    wait_until(lambda: bool(scheduler.app.control.inspect(timeout=10, limit=1).ping()), "the next answer")
    assert system.worker.running


@pytest.mark.parametrize("queue", ["celery", "forkvm2", "forkvm.a b"])
def test_no_message_of_another_applications_queue_is_taken(system: System, scheduler: Scheduler, queue: str) -> None:
    answer = _answer(scheduler, "add_consumer", queue=queue)

    assert "forkvm serves the queues forkvm and forkvm.DOMAIN" in answer["error"]
    assert queue not in str(scheduler.app.control.inspect(timeout=10, limit=1).active_queues()).split("'")


WRONG_ARGUMENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "an exchange that is not a name": ("add_consumer", {"queue": "forkvm.x", "exchange": 7}),
    "a type of exchange that there is not": ("add_consumer", {"queue": "forkvm.y", "exchange_type": "none"}),
    "a time limit that is not a number": ("time_limit", {"task_name": "forkvm.fork", "hard": "x"}),
    "a negative time limit": ("time_limit", {"task_name": "forkvm.fork", "hard": -1}),
    "a task that is not a name": ("time_limit", {"task_name": ["forkvm.fork"], "hard": 60}),
    "a text as a number of processes": ("pool_grow", {"n": "2"}),
    "nothing as a number of processes": ("pool_shrink", {"n": None}),
    "a negative number of processes": ("pool_shrink", {"n": -1}),
}


@pytest.mark.parametrize("kind", WRONG_ARGUMENTS)
def test_wrong_arguments_change_nothing(system: System, scheduler: Scheduler, kind: str) -> None:
    command, arguments = WRONG_ARGUMENTS[kind]

    answer = _answer(scheduler, command, **arguments)

    assert command == "add_consumer" or "must be" in answer["error"]
    _assert_serves(system)
    if command == "add_consumer":
        _answer(scheduler, "cancel_consumer", queue=arguments["queue"])


@pytest.mark.parametrize("limit", [-1, "1/h"])
def test_no_message_is_held_by_a_rate_limit(system: System, scheduler: Scheduler, limit: Any) -> None:
    answer = _answer(scheduler, "rate_limit", task_name="forkvm.fork", rate_limit=limit)

    assert "no rate limits" in answer["error"]
    _assert_serves(system)
    _assert_serves(system)


@pytest.mark.parametrize("count", [2, 3])
def test_a_worker_keeps_a_pool_process(system: System, scheduler: Scheduler, count: int) -> None:
    answer = _answer(scheduler, "pool_shrink", n=count)

    assert "at least one pool process" in answer["error"]
    assert len(system.worker.children) == 2
    _assert_serves(system)


def _assert_serves(system: System) -> None:
    """Check that the worker still answers a message: one that it refuses, which takes a pool process too."""
    sent = system.scheduler.send({"source": "relative"})
    assert "invalid_request" in system.scheduler.wait_failed(sent)[0]
    assert system.worker.running
