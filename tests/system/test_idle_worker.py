"""The commands that an idle worker sends to Redis."""

from __future__ import annotations

import time

from tests.support.system.systems import System

#: Seconds of one observation: the longest interval of the periodic commands, which is that of sweeps and of the
#: worker's record.
SECONDS = 10.0
#: The number of observations, since a worker sends more in its first seconds.
TRIES = 6
#: Commands a second, at most.
MOST = 3.0


def test_an_idle_worker_sends_few_commands(system: System) -> None:
    system.scheduler.redis.set("forkvm:walk:forkvm", 1, ex=3600)  # the roots have been searched
    system.scheduler.wait_quiet()

    rates = [_rate(system)]
    while rates[-1] > MOST and len(rates) < TRIES:
        rates.append(_rate(system))

    assert rates[-1] <= MOST, rates


def _rate(system: System) -> float:
    """The number of commands per second that Redis receives from the worker."""
    before, began = _commands(system), time.monotonic()
    time.sleep(SECONDS)
    return (_commands(system) - before - 1) / (time.monotonic() - began)


def _commands(system: System) -> int:
    return int(system.scheduler.redis.info("stats")["total_commands_processed"])
