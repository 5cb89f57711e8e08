"""Messages that a worker refuses: their clients get the reason, and no other job under the same id is affected."""

from __future__ import annotations

import base64
import datetime
import decimal
import json
import uuid
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, chord, signature
from celery.exceptions import ChordError

from tests.fixtures.filesystems import Fresh
from tests.fixtures.processes import wait_until
from tests.support.guests import make_guest
from tests.support.system.scheduler import QUEUE, Scheduler
from tests.support.system.staging_view import StagingView
from tests.support.system.systems import System, spin_until

SECRET = "a-guests-secret"


def _request(directory: Path) -> dict[str, Any]:
    if not (directory / "a").exists():
        make_guest(directory / "a")
    return {"source": str(directory / "a"), "destination": str(directory / "b"), "labels": {"token": SECRET}}


def _raw(request: dict[str, Any], fork_id: str, task: str = "forkvm.fork") -> dict[str, Any]:
    return {
        "body": _encoded([[], {"request": request}, {}]),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {"lang": "py", "task": task, "id": fork_id, "root_id": fork_id, "parent_id": None},
        "properties": {
            "correlation_id": fork_id,
            "delivery_mode": 2,
            "delivery_tag": str(uuid.uuid4()),
            "body_encoding": "base64",
            "delivery_info": {"exchange": "", "routing_key": QUEUE},
        },
    }


def _encoded(body: object) -> str:
    return base64.b64encode(body if isinstance(body, bytes) else json.dumps(body).encode()).decode()


def _header(name: str, value: object) -> Callable[[dict[str, Any]], object]:
    return lambda message: message["headers"].update({name: value})


def _body(body: object, **headers: object) -> Callable[[dict[str, Any]], object]:
    def damage(message: dict[str, Any]) -> None:
        message["body"] = _encoded(body)
        message["headers"] |= headers

    return damage


def _old(message: dict[str, Any]) -> None:
    """As a client with `task_protocol=1` sends it."""
    body = {"task": "forkvm.fork", "id": message["headers"]["id"], "args": [], "kwargs": {}, "utc": True}
    message |= {"headers": {}, "body": _encoded(body)}


BOMB = zlib.compress(b" " * (256 << 20), 9)
#: The defect of a message, and a word of the reason.
DAMAGED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "protocol 1": (_old, "protocol"),
    "unknown compression": (_header("compression", "application/x-none"), "compression"),
    "no base64": (lambda message: message.update(body="!"), "JSON"),
    "a bomb": (_body(BOMB, compression="application/x-gzip"), "longer"),
    "compressed twice": (_body(zlib.compress(BOMB), compression="zlib"), "JSON"),
    "cut off": (_body(zlib.compress(b"[[], {}, {}]")[:-5], compression="zlib"), "compression"),
    "no JSON": (_body(b"\x80\x04pickle"), "JSON"),
    "deep JSON": (_body(b"[" * 100_000), "JSON"),
    "another shape": (_body({"request": SECRET}), "arguments"),
    "two arguments": (_body([[1, 2], {}, {}]), "one argument"),
    "an argument named self": (_body([[], {"self": SECRET}, {}]), "one argument"),
    "pickle": (lambda message: message.update({"content-type": "application/x-python-serialize"}), "content-type"),
    "a time that is too far away": (_header("eta", "9998-01-01T00:00:00+00:00"), "days"),
    "no time": (_header("eta", "tomorrow"), "eta"),
    "no time of expiry": (_header("expires", "never"), "expires"),
    "no number of retries": (_header("retries", "x"), "retries"),
    "an unknown type": (_body([[{"__type__": SECRET, "__value__": SECRET}], {}, {}]), "JSON"),
    "an option that replaces the id": (_body([[], {}, {"id": "other"}]), "options"),
    "an option that redirects": (_body([[], {}, {"delivery_info": {"routing_key": "other"}}]), "options"),
    "callbacks of a wrong type": (_body([[], {}, {"callbacks": "other"}]), "options"),
    "a huge workflow": (_body([[], {}, {"chain": [{"task": "x", "args": ["x" * (2 << 20)]}]}]), "options"),
}


@pytest.mark.parametrize(
    ("case", "task"),
    [
        (case, task)
        for case in DAMAGED
        for task in ("forkvm.fork", "forkvm.campaign")
        if (case, task) != ("protocol 1", "forkvm.campaign")  # the task is in its body
    ],
)
def test_refused_message_ends_its_job_as_invalid_request(
    system: System, scheduler: Scheduler, fresh: Fresh, case: str, task: str
) -> None:
    directory, fork_id = fresh("xfs"), f"refused-{task}-{case}"
    damage, word = DAMAGED[case]
    message = _raw(_request(directory), fork_id, task)
    damage(message)

    scheduler.redis.lpush(QUEUE, json.dumps(message))

    text, _ = scheduler.wait_failed(scheduler.app.AsyncResult(fork_id))
    assert text.startswith("invalid_request")
    assert word in text
    assert SECRET not in system.worker.output()
    assert repr(fork_id) in system.worker.output() or word == "one argument"
    assert sorted(path.name for path in directory.iterdir()) == ["a"]


@pytest.mark.parametrize("value", [uuid.uuid4(), datetime.datetime.now(), decimal.Decimal(1), b"x"], ids=type)  # noqa: DTZ005
def test_python_types_in_a_request_are_refused_with_a_complete_result(
    scheduler: Scheduler, fresh: Fresh, value: object
) -> None:
    request = _request(fresh("xfs"))

    text, result = scheduler.wait_failed(scheduler.send(request | {"labels": {"n": value}}))

    assert text.startswith("invalid_request")
    assert (result["source"], result["destination"]) == (request["source"], request["destination"])


@pytest.mark.parametrize("task", ["forkvm.fork", "forkvm.campaign"])
def test_a_client_that_sends_a_uuid_object_as_id_gets_an_error(scheduler: Scheduler, fresh: Fresh, task: str) -> None:
    arguments = {"request": _request(fresh("xfs"))}
    sent = scheduler.app.send_task(task, kwargs=arguments, task_id=uuid.uuid4(), queue=QUEUE)  # type: ignore[arg-type]

    with pytest.raises(Exception, match="invalid_request: its id is a UUID; send it as a string"):
        sent.get(timeout=20)


@pytest.mark.parametrize("length", [513, 4096])
def test_a_client_gets_an_error_for_an_id_that_is_too_long(scheduler: Scheduler, fresh: Fresh, length: int) -> None:
    text, _ = scheduler.wait_failed(scheduler.send(_request(fresh("xfs")), "i" * length))

    assert "its id is longer than 512" in text


@pytest.mark.parametrize("method", ["gzip", "zlib", "bzip2", "lzma", "xz"])
def test_compressed_request_is_served(scheduler: Scheduler, fresh: Fresh, method: str) -> None:
    request = _request(fresh("xfs"))
    sent = scheduler.app.send_task("forkvm.fork", kwargs={"request": request}, queue=QUEUE, compression=method)

    assert scheduler.wait(sent)["status"] == "succeeded"
    assert Path(request["destination"]).exists()


def test_a_client_with_protocol_1_gets_an_error(system: System, fresh: Fresh) -> None:
    client = Celery("old", broker=system.server.broker_url, backend=system.server.backend_url, set_as_current=False)
    client.conf.task_protocol = 1
    sent = client.send_task("forkvm.fork", kwargs={"request": _request(fresh("xfs"))}, queue=QUEUE)

    with pytest.raises(Exception, match="use protocol 2"):
        sent.get(timeout=20)
    client.close()


def test_errback_and_chord_of_a_refused_message_get_the_error(scheduler: Scheduler, fresh: Fresh) -> None:
    request = _request(fresh("xfs")) | {"labels": {"n": decimal.Decimal(1)}}
    fork = signature("forkvm.fork", kwargs={"request": request}, app=scheduler.app, queue=QUEUE)
    note = signature("client.note", app=scheduler.app, queue="notices")

    body = chord([fork.clone().set(task_id="one", link_error=note), fork.clone().set(task_id="two")])(note)

    wait_until(lambda: body.state == "FAILURE", "the end of the chord")
    assert isinstance(body.result, ChordError)
    wait_until(lambda: int(scheduler.redis.llen("notices")) == 1, "the errback")
    scheduler.wait_quiet()
    assert scheduler.redis.llen("notices") == 1
    scheduler.redis.delete("notices")


def test_refused_message_under_the_id_of_another_job_changes_neither_its_state_nor_its_result(
    system: System, scheduler: Scheduler, large_source: Path, workdir: Path
) -> None:
    request = {"source": str(large_source), "destination": str(workdir / "b")}
    sent = scheduler.send(request, "held")
    damaged = _raw(request, "held")
    damaged["content-type"] = "application/x-yaml"
    spin_until(StagingView(workdir, "held").begun, "the first chunk")

    scheduler.redis.rpush(QUEUE, json.dumps(damaged))
    result = scheduler.wait(sent)
    scheduler.redis.lpush(QUEUE, json.dumps(damaged))
    scheduler.wait_quiet()

    assert result["status"] == "succeeded"
    assert (sent.state, scheduler.results.final.fork("held")) == ("SUCCESS", result)
    system.assert_left_nothing_in(workdir)
