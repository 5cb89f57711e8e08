"""Both versions write the same formats: keys and values in Redis, and messages."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

from tests.fixtures.filesystems import Fresh
from tests.fixtures.processes import wait_until
from tests.support.guests import make_guest
from tests.support.system import queued_campaigns as campaigns
from tests.support.system.messages import Message, Recorder
from tests.support.system.scheduler import Scheduler
from tests.upgrade.conftest import StartVersion, Version

#: Differences from run to run: numbers, also those in file names and in times, and random ids.
_RANDOM = re.compile(r"[0-9a-f]{8}-[0-9a-f-]{27}|[0-9a-f]{32}|[0-9]+")
#: Temporary keys, and keys that count sweeps.
_TEMPORARY = re.compile(r"_kombu|unacked|forkvm:sweep|forkvm:walk|recorder|kombu")


def test_both_versions_write_the_same_keys_values_and_messages(
    start_version: StartVersion, own_scheduler: Scheduler, fresh: Fresh
) -> None:
    workdir = fresh("xfs_noreflink")
    make_guest(workdir / "source")
    campaigns.make_source(workdir / "small", files=3)

    earlier = _formats("earlier", start_version, own_scheduler, workdir)
    this = _formats("this", start_version, own_scheduler, workdir)

    assert this[0] == earlier[0]
    assert this[1] == earlier[1]
    assert len(earlier[0]) > 10
    assert {message[0] for message in earlier[1]} >= {"forkvm.fork", "forkvm.chunk", "forkvm.finish", "forkvm.batch"}


def _formats(
    version: Version, start: StartVersion, scheduler: Scheduler, workdir: Path
) -> tuple[dict[str, Any], set[tuple[Any, ...]]]:
    """The keys with their values, and the messages, of a few jobs, with the differences between runs masked."""
    scheduler.redis.flushall()
    parent = workdir / "forks"
    parent.mkdir()
    (parent / "taken").mkdir()
    (parent / "vm-0002").mkdir()
    worker = start(version)
    with Recorder(scheduler.server) as recorder:
        scheduler.send(
            {"source": str(workdir / "source"), "destination": str(parent / "fork"), "labels": {"a": "b"}}, "f1"
        )
        scheduler.send({"source": str(workdir / "source"), "destination": str(parent / "taken")}, "f2")
        scheduler.send({"source": str(workdir / "source")}, "f3")
        campaigns.send(scheduler, campaigns.request_of(workdir / "small", parent, 5), "c1")
        for job in ("f1", "f2", "f3", "c1"):
            wait_until(lambda job=job: scheduler.results.states.get(job)["status"] in _ENDS, f"the end of {job}")  # type: ignore[misc]
        scheduler.wait_quiet()
    worker.end()
    keys = {_masked(key.decode()): _value(scheduler, key) for key in scheduler.redis.scan_iter(count=1000)}
    parent.rename(workdir / f"forks-{version}")
    return {key: value for key, value in keys.items() if not _TEMPORARY.search(key)}, set(
        map(_format, recorder.messages)
    )


_ENDS = ("SUCCESS", "FAILURE", "REVOKED")


def _value(scheduler: Scheduler, key: bytes) -> Any:
    redis: Any = scheduler.redis
    kind = redis.type(key).decode()
    expires = redis.ttl(key) != -1
    if kind == "string":
        return kind, expires, _shape(redis.get(key))
    if kind == "hash":
        return kind, expires, {_masked(name.decode()): _shape(value) for name, value in redis.hgetall(key).items()}
    members = redis.zrange(key, 0, -1) if kind == "zset" else redis.smembers(key) if kind == "set" else []
    return kind, expires, sorted({str(_shape(member)) for member in members})


def _format(message: Message) -> tuple[Any, ...]:
    content = json.loads(message.raw)
    headers = {name: None if name in ("origin", "timelimit") else value for name, value in content["headers"].items()}
    arguments = json.loads(base64.b64decode(content["body"]))
    return message.task, message.queue, str(_mask(headers)), str(_mask(arguments)), str(sorted(content["properties"]))


def _shape(value: bytes | None) -> Any:
    try:
        return _mask(json.loads(value or b"null"))
    except ValueError:
        return type(value).__name__


def _mask(value: Any) -> Any:
    """The same structure with the differences between runs masked."""
    if isinstance(value, dict):
        # Celery stores Python's traceback with a failure. A fork that waited with others is stored without one.
        return {_masked(name): _mask(item) for name, item in value.items() if name != "traceback"}
    if isinstance(value, list):
        return [_mask(item) for item in value]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "number"
    if isinstance(value, str):
        return "text" if " " in value else _masked(value)  # the text of an error message is not part of the format
    return value


def _masked(text: str) -> str:
    return _RANDOM.sub("#", text)
