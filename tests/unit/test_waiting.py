"""Whether a message waits: in its queue, or taken by a worker that was killed."""

from __future__ import annotations

import json

import pytest
from fakeredis import FakeRedis
from kombu.transport.redis import Channel

from tasks.delivery.waiting import is_waiting
from tasks.store.queues import lists_of

QUEUE, UNACKED = "forkvm", "forkvm:unacked"


def message(job_id: object) -> str:
    return json.dumps({"headers": {"id": job_id}, "body": "f1 f2 f3"})


@pytest.fixture
def redis() -> FakeRedis:
    """A queue of 2,500 messages, including some that are not Celery's, and one message that a worker has taken."""
    redis = FakeRedis()
    redis.rpush(QUEUE, "no JSON f1", "[]", json.dumps({"headers": ["f1"]}), message(["f1"]), "[" * 100_000 + "f1")
    redis.rpush(QUEUE, *(message(f"fork-{n}") for n in range(2_500)))
    redis.hset(UNACKED, mapping={"tag-1": json.dumps([json.loads(message("taken")), "", QUEUE]), "tag-2": "taken{}"})
    return redis


@pytest.mark.parametrize("job_id", ["fork-0", "fork-999", "fork-1000", "fork-2499", "taken"])
def test_a_message_is_found_wherever_it_is(job_id: str, redis: FakeRedis) -> None:
    assert is_waiting(redis, job_id, QUEUE, UNACKED)


@pytest.mark.parametrize("job_id", ["f1", "fork-2500", "fork", "tag-1", '"', "\udcff", ""])
def test_an_id_that_only_resembles_it_is_not_found(job_id: str, redis: FakeRedis) -> None:
    assert not is_waiting(redis, job_id, QUEUE, UNACKED)


def test_an_id_of_any_characters_is_found() -> None:
    redis = FakeRedis()
    redis.rpush(QUEUE, message('ü"\n\udcff'))

    assert is_waiting(redis, 'ü"\n\udcff', QUEUE, UNACKED)


def test_the_lists_of_a_queue_are_those_that_kombu_uses() -> None:
    names = [f"{QUEUE}{Channel.sep}{priority}" if priority else QUEUE for priority in Channel.priority_steps]

    assert lists_of(QUEUE) == names
