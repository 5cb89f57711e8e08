"""Queue commands, and a fork that ends between two reads of the command."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from celery import states

from tasks.copier.fork_spec import Clock, ForkSpec, succeeded
from tasks.copier.report import Totals
from tasks.store.job_states import state_json
from tests.fixtures.redis_server import RedisServer
from worker.client import Client
from worker.settings import Settings

FORK_ID = "ends"


@pytest.mark.parametrize("reads_before", range(3))
def test_status_never_shows_an_ended_job_without_its_result(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch, reads_before: int
) -> None:
    # Given a fork whose result is stored and then published by Celery between two reads of `status`
    client = Client(Settings(broker_url=redis_server.broker_url))
    results = client.results
    spec = ForkSpec(fork_id=FORK_ID, source="/a", destination="/b")
    result = succeeded(spec, Totals(), 0, Clock(spec.started))
    ask: Callable[..., Any] = results.redis.execute_command
    reads = 0

    def end_between(*command: Any, **options: Any) -> Any:
        nonlocal reads
        if reads == reads_before:
            reads += 1
            results.final.store(FORK_ID, result)
            results.redis.set(results.state_key(FORK_ID), state_json(FORK_ID, states.SUCCESS, "null"), ex=60)
        reads += 1
        return ask(*command, **options)

    monkeypatch.setattr(results.redis, "execute_command", end_between)

    # When
    status = client.status(FORK_ID)

    # Then
    assert (status.state in states.READY_STATES) == (status.result is not None)
    assert client.status(FORK_ID).result == result
