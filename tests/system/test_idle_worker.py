"""What a worker that has nothing to do asks Redis."""

from __future__ import annotations

import time

from tests.support.system.systems import System

#: Seconds that the worker is watched: longer than the interval of every periodic command but a sweep's search.
SECONDS = 6.0
#: Commands a second, at most.
MOST = 3.0


def test_an_idle_worker_sends_few_commands(system: System) -> None:
    redis = system.scheduler.redis
    system.scheduler.wait_quiet()
    before, began = _commands(system), time.monotonic()
    time.sleep(SECONDS)
    sent, seconds = _commands(system) - before - 1, time.monotonic() - began

    assert sent / seconds <= MOST, redis.info("commandstats")


def _commands(system: System) -> int:
    return int(system.scheduler.redis.info("stats")["total_commands_processed"])
