"""The records of workers over a fake Redis: how long they count, and what is not a record."""

from __future__ import annotations

import json

import fakeredis
import pytest

from tasks.store.keys import WORKER_SECONDS, WORKERS
from tasks.store.results import Results
from tasks.store.workers import WorkerRecord

RECORD = WorkerRecord("w@host", "1.0", "host", ["forkvm", "forkvm.nvme-a"], 4)


def _age(results: Results, redis: fakeredis.FakeRedis, name: str, seconds: float) -> None:
    """Let a record be so much older."""
    data = json.loads(redis.hget(WORKERS.pattern, name) or b"")
    redis.hset(WORKERS.pattern, name, json.dumps(data | {"seen_at": data["seen_at"] - seconds}))


def test_a_worker_has_one_record_and_its_age(results: Results, redis: fakeredis.FakeRedis) -> None:
    results.workers.keep(RECORD)
    ending = WorkerRecord("w@host", "1.1", "host", ["forkvm"], 2, ending=True)
    results.workers.keep(ending)
    _age(results, redis, "w@host", 180)

    ((name, seen),) = results.workers.seen().items()

    assert (name, seen.record) == ("w@host", ending)
    assert 180 <= seen.age < 190
    assert redis.ttl(WORKERS.pattern) == WORKER_SECONDS


def test_a_record_counts_for_an_hour_and_is_then_removed_by_a_worker_that_starts(
    results: Results, redis: fakeredis.FakeRedis
) -> None:
    for name, age in (("old", WORKER_SECONDS + 60), ("lost", WORKER_SECONDS - 60), ("here", 0)):
        results.workers.keep(WorkerRecord(name, "1.0", "host", ["forkvm"], 4))
        _age(results, redis, name, age)

    seen = set(results.workers.seen())
    results.workers.remove_old()

    assert seen == {"lost", "here"}
    assert redis.hkeys(WORKERS.pattern) == [b"lost", b"here"]


def test_a_worker_removes_its_own_record_only(results: Results) -> None:
    results.workers.keep(RECORD)
    results.workers.keep(WorkerRecord("other@host", "1.0", "host", ["forkvm"], 4))

    results.workers.remove("w@host")

    assert set(results.workers.seen()) == {"other@host"}


def test_a_record_with_fields_of_a_later_version_is_read(results: Results, redis: fakeredis.FakeRedis) -> None:
    results.workers.keep(RECORD)
    data = json.loads(redis.hget(WORKERS.pattern, "w@host") or b"")
    redis.hset(WORKERS.pattern, "w@host", json.dumps(data | {"later": 1}))

    assert results.workers.seen()["w@host"].record == RECORD


@pytest.mark.parametrize(
    "change",
    [
        {"seen_at": "1"},
        {"seen_at": 1e400},
        {"queues": "forkvm"},
        {"queues": [1]},
        {"children": -1},
        {"version": None},
        {"ending": 1},
    ],
)
def test_a_field_that_is_no_workers_is_left_out(
    results: Results, redis: fakeredis.FakeRedis, change: dict[str, object]
) -> None:
    results.workers.keep(RECORD)
    data = json.loads(redis.hget(WORKERS.pattern, "w@host") or b"")
    redis.hset(WORKERS.pattern, "bad", json.dumps(data | change))

    assert set(results.workers.seen()) == {"w@host"}


@pytest.mark.parametrize("value", [b"", b"[]", b"{}", b"\xff", b"[" * 100_000])
def test_a_value_that_is_no_record_is_left_out_and_kept(
    results: Results, redis: fakeredis.FakeRedis, value: bytes
) -> None:
    results.workers.keep(RECORD)
    redis.hset(WORKERS.pattern, "bad", value)

    seen = set(results.workers.seen())
    results.workers.remove_old()

    assert seen == {"w@host"}
    assert redis.hexists(WORKERS.pattern, "bad")  # it may be the record of a later version
