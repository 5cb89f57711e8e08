"""The messages that a pool process takes from the queue itself, and what happens to them; with a real Redis."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import redis

from tasks.delivery.queue_of_forks import QueueOfForks
from tests.fixtures.redis_server import RedisServer

UNACKED = "forkvm:unacked"


@pytest.fixture
def client(redis_server: RedisServer) -> Iterator[redis.Redis]:
    with redis_server.client(decode_responses=False) as client:
        yield client
        client.flushall()


@pytest.fixture
def queue(client: redis.Redis) -> QueueOfForks:
    return QueueOfForks(client, "forkvm", UNACKED)


def _message(job_id: str = "fork-1", task: str = "forkvm.fork", **headers: Any) -> bytes:
    message = {
        "body": "W10=",
        "headers": {"task": task, "id": job_id, "eta": None, "timelimit": [None, None], **headers},
        "properties": {"delivery_info": {"exchange": "", "routing_key": "forkvm"}},
    }
    return json.dumps(message).encode("ascii")


#: Python's JSON parser, with which kombu reads the record of a message whose process was killed, refuses the first
#: four.
NOT_PLAIN = {
    "a control character": _message().replace(b"fork-1", b"fork\t1"),
    "a byte that is not UTF-8": _message().replace(b"fork-1", b"fork\xb81"),
    "a hexadecimal number": _message(n=7).replace(b" 7}", b" 0x7}"),
    "deep nesting": _message(n=7).replace(b" 7}", b" " + b"[" * 990 + b"]" * 990 + b"}"),
    "no JSON": b"{",
    "another task": _message(task="forkvm.campaign"),
    "a time to end": _message(expires="2026-11-27T00:00:00"),
    "a time limit": _message(timelimit=[5, None]),
    "a stamp": _message(stamps={"a": ["b"]}),
    "a second delivery": _message(redelivered=True),
    "a long message": _message("f" * (16 << 10)),
}


@pytest.mark.parametrize("name", list(NOT_PLAIN))
def test_a_message_with_extra_fields_is_left_to_the_worker(client: redis.Redis, queue: QueueOfForks, name: str) -> None:
    client.lpush("forkvm", _message("first"), NOT_PLAIN[name], _message("last"))

    taken = queue.take(10, "tag")

    assert [one.text for one in taken] == [_message("first")]
    assert client.lrange("forkvm", 0, -1) == [_message("last"), NOT_PLAIN[name]]
    assert queue.take(10, "tag") == []


def test_a_taken_message_is_recorded_until_it_is_acknowledged(client: redis.Redis, queue: QueueOfForks) -> None:
    client.lpush("forkvm", _message("a"), _message("b"), _message("c"))

    taken = queue.take(2, "tag")

    assert [one.text for one in taken] == [_message("a"), _message("b")]
    recorded = {tag: json.loads(entry) for tag, entry in client.hgetall(UNACKED).items()}
    assert recorded == {one.tag.encode(): [json.loads(one.text), "", "forkvm"] for one in taken}
    queue.acknowledge(one.tag for one in taken)
    assert not client.exists(UNACKED, f"{UNACKED}_index")


def test_messages_of_a_lost_process_are_returned_and_taken_only_by_a_worker(
    client: redis.Redis, queue: QueueOfForks
) -> None:
    client.lpush("forkvm", _message("a"), _message("b"), _message("c"))
    queue.take(2, "lost")
    kept = queue.take(1, "other")

    assert queue.give_back_of("lost") == 2

    returned = [json.loads(text)["headers"] for text in client.lrange("forkvm", 0, -1)]
    assert sorted((headers["id"], headers["redelivered"]) for headers in returned) == [("a", True), ("b", True)]
    assert client.hkeys(UNACKED) == [one.tag.encode() for one in kept]
    assert queue.take(10, "tag") == []


def test_a_message_that_was_already_redelivered_is_not_returned(client: redis.Redis, queue: QueueOfForks) -> None:
    client.lpush("forkvm", _message("a"), _message("b"))
    taken = queue.take(2, "tag")
    client.hdel(UNACKED, taken[0].tag)

    queue.give_back(taken)

    assert client.lrange("forkvm", 0, -1) == [_message("b")]
