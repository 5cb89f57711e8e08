"""The store over a fake Redis, since no message goes through it."""

from __future__ import annotations

from collections.abc import Iterator

import fakeredis
import pytest

from tasks.store.keys import OPEN_SECONDS
from tasks.store.results import Results

EXPIRES = 3600


@pytest.fixture
def server() -> fakeredis.FakeServer:
    return fakeredis.FakeServer()


@pytest.fixture
def redis(server: fakeredis.FakeServer) -> Iterator[fakeredis.FakeRedis]:
    with fakeredis.FakeRedis(server=server) as client:
        yield client
        for key in client.scan_iter():
            assert 0 < client.ttl(key) <= OPEN_SECONDS, f"{key!r} has no TTL"


@pytest.fixture
def results(redis: fakeredis.FakeRedis) -> Results:
    return Results(redis, EXPIRES, lambda fork_id: f"celery-task-meta-{fork_id}")
