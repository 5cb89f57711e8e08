"""The message filter: what it accepts, and the reasons with which it refuses the rest."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import pytest

from worker.runtime.message_filter import checked
from worker.runtime.refused_messages import Refused, log_fields_of

TASKS = {"forkvm.fork", "forkvm.chunk", "forkvm.finish", "celery.backend_cleanup"}
SECRET = "a-guest's-secret"


def _body(value: object) -> str:
    return base64.b64encode(json.dumps(value).encode()).decode()


def _message(task: str = "forkvm.fork", body: object = None) -> dict[str, Any]:
    arguments = [[], {"request": {"source": "/guests/a", "destination": "/guests/b"}}, {}]
    return {
        "body": _body(arguments if body is None else body),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {"lang": "py", "task": task, "id": "fork-17", "root_id": "fork-17", "parent_id": None},
        "properties": {
            "correlation_id": "fork-17",
            "delivery_mode": 2,
            "delivery_tag": "one",
            "body_encoding": "base64",
            "delivery_info": {"exchange": "", "routing_key": "forkvm"},
        },
    }


def test_message_of_a_client_is_accepted_unchanged_except_its_delivery_info() -> None:
    message = _message()
    message["properties"]["delivery_info"] = {"exchange": "elsewhere", "routing_key": "elsewhere"}

    first, second = (checked(message, "forkvm", TASKS) for _ in range(2))

    assert first["properties"]["delivery_info"] == {"exchange": "", "routing_key": "forkvm"}
    assert first["properties"]["delivery_tag"] != second["properties"]["delivery_tag"]
    assert {name: first[name] for name in ("body", "headers")} == {name: message[name] for name in ("body", "headers")}


@pytest.mark.parametrize("name", ["delivery_tag", "delivery_info", "correlation_id", "delivery_mode"])
def test_fields_that_only_the_consumer_needs_may_be_missing(name: str) -> None:
    message = _message()
    del message["properties"][name]

    assert checked(message, "forkvm", TASKS)["properties"]["delivery_tag"]


def test_headers_that_nobody_reads_are_removed() -> None:
    message = _message()
    message["headers"] |= {"get": 1, "callbacks": [1], "is_eager": True, "delivery_info": {}, "redelivered": True}

    assert checked(message, "forkvm", TASKS)["headers"] == _message()["headers"] | {"redelivered": True}


def _header(name: str, value: object) -> Callable[[dict[str, Any]], object]:
    return lambda message: message["headers"].update({name: value})


def _field(name: str, value: object) -> Callable[[dict[str, Any]], object]:
    return lambda message: message.update({name: value})


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        pytest.param(_field("body", None), "body", id="no body"),
        pytest.param(_field("body", _body([1, 2])), "the body is not", id="no arguments"),
        pytest.param(_field("body", "!"), "not JSON", id="no base64"),
        pytest.param(_field("body", base64.b64encode(b"[" * 100_000).decode()), "not JSON", id="deep"),
        pytest.param(_field("content-type", "application/x-python-serialize"), "content-type", id="pickle"),
        pytest.param(_field("headers", {}), "headers.task", id="no headers"),
        pytest.param(_header("id", ["x"]), "headers.id", id="a list as id"),
        pytest.param(_header("id", ""), "headers.id", id="an empty id"),
        pytest.param(_header("id", "x" * 513), "longer than 512", id="a long id"),
        pytest.param(_header("id", "\ud800"), "headers.id", id="an id that Redis cannot store"),
        pytest.param(_header("eta", "tomorrow"), "eta", id="no time"),
        pytest.param(_header("eta", "9999-12-31T23:59:59"), "days away", id="a time that is too far away"),
        pytest.param(_header("eta", "0001-01-01T00:00:00+14:00"), "eta", id="a time that is too early"),
        pytest.param(_header("compression", "zip"), "compression", id="unknown compression"),
        pytest.param(_header("compression", "bzip2"), "compression", id="invalid bzip2 data"),
        pytest.param(_field("body", _body([[], {"self": 1}, {}])), "one argument", id="self"),
        pytest.param(_field("body", _body([[], {}, {"id": SECRET}])), "options", id="an option that replaces the id"),
        pytest.param(_field("body", _body([[], {}, {"callbacks": "x"}])), "options", id="callbacks of a wrong type"),
        pytest.param(
            _field("body", _body([[{"__type__": SECRET, "__value__": 1}], {}, {}])), "JSON", id="a type of kombu"
        ),
        pytest.param(
            _field("body", _body([[], {}, {"callbacks": [{"task": "x", "args": [{"__type__": 1, "__value__": 1}]}]}])),
            "cannot decode",
            id="a type unknown to kombu",
        ),
        pytest.param(_header("task", "celery.backend_cleanup"), "no task", id="a task of Celery's own"),
        pytest.param(_header("task", "os.system"), "no task", id="no task"),
        pytest.param(_header("task", "forkvm.finish"), "destination", id="arguments of another task"),
    ],
)
def test_a_value_that_is_no_task_message_is_refused_without_quoting_it(
    damage: Callable[[dict[str, Any]], object], reason: str
) -> None:
    message = _message(body=[[], {"request": {"labels": {"token": SECRET}}}, {}])
    damage(message)

    with pytest.raises(Refused) as refused:
        checked(message, "forkvm", TASKS)

    assert reason in str(refused.value)
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize(
    ("task", "job_id", "fields"),
    [
        ("forkvm.fork", "f", {"task_id": "f", "fork_id": "f"}),
        ("forkvm.chunk", "f.chunk.0", {"task_id": "f.chunk.0", "fork_id": "f"}),
        ("os.system", "x", {"task_id": "x"}),
        ("os.system", ["x"], {}),
        (None, "x", {}),
    ],
)
def test_the_log_names_what_is_known_of_a_refused_message(task: object, job_id: object, fields: object) -> None:
    message = _message()
    message["headers"] |= {"task": task, "id": job_id}

    assert log_fields_of(message) == fields


@pytest.mark.parametrize("message", [None, 1, "x", [], [[]], {}])
def test_a_message_that_is_no_object_is_refused(message: object) -> None:
    with pytest.raises(Refused) as refused:
        checked(message, "forkvm", TASKS)

    assert message == {} or str(refused.value) == "it is not a JSON object"
