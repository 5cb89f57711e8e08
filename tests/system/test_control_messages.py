"""Malformed messages of remote control: a worker ignores each with one line that does not repeat it."""

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


@pytest.mark.parametrize("queue", [5, ["a", "b"], None], ids=repr)
@pytest.mark.parametrize("command", ["add_consumer", "cancel_consumer"])
def test_a_queue_that_is_not_a_name_is_refused(system: System, scheduler: Scheduler, command: str, queue: Any) -> None:
    answers = scheduler.app.control.broadcast(command, {"queue": queue}, reply=True, timeout=10, limit=1)

    ((answer,),) = (each.values() for each in answers or [])
    assert "the queue must be a name" in answer["error"]
    wait_until(lambda: bool(scheduler.app.control.inspect(timeout=10, limit=1).ping()), "the next answer")
    assert system.worker.running
