"""Redis refuses writes for a while, as in a failover: all processes wait, and no state goes backwards."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from redis import Redis
from redis.exceptions import ResponseError

from tests.faults.fault_points import FaultPoints
from tests.faults.paused_forks import (
    CHILDREN,
    Guests,
    StartArmedWorker,
    assert_served_and_clean,
    resume,
    start_paused_forks,
)
from tests.fixtures.processes import StartWorker, wait_until
from tests.support.system.scheduler import Scheduler, states


class Refusal(NamedTuple):
    begin: Callable[[Scheduler], object]
    end: Callable[[Redis], object]


def _break_saving(scheduler: Scheduler) -> None:
    """Kill the child process that saves the data; Redis then refuses writes until a save succeeds."""
    redis, server = scheduler.redis, scheduler.server.pid
    redis.config_set("save", "3600 1")
    redis.config_set("rdb-key-save-delay", 10_000_000)  # microseconds
    redis.bgsave()
    for child in Path(f"/proc/{server}/task/{server}/children").read_text().split():
        os.kill(int(child), signal.SIGKILL)
    wait_until(lambda: redis.info("persistence")["rdb_last_bgsave_status"] == "err", "the save to fail")


def _set_rights(redis: Redis, *rules: str) -> None:
    redis.execute_command("ACL", "SETUSER", "default", *rules)  # type: ignore[no-untyped-call]


REFUSALS = {
    "READONLY": Refusal(lambda s: s.redis.replicaof("127.0.0.1", "1"), lambda redis: redis.replicaof("NO", "ONE")),
    "NOREPLICAS": Refusal(
        lambda s: s.redis.config_set("min-replicas-to-write", 1),
        lambda redis: redis.config_set("min-replicas-to-write", 0),
    ),
    "NOPERM": Refusal(lambda s: _set_rights(s.redis, "-@write"), lambda redis: _set_rights(redis, "+@write")),
    "NOPERM of scripts": Refusal(
        lambda s: _set_rights(s.redis, "-@write", "-@scripting"),
        lambda redis: _set_rights(redis, "+@write", "+@scripting"),
    ),
    "MISCONF": Refusal(_break_saving, lambda redis: redis.config_set("stop-writes-on-bgsave-error", "no")),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_forks_wait_while_redis_refuses_writes_and_no_state_goes_backwards(
    start_armed_worker: StartArmedWorker, fault_points: FaultPoints, guests: Guests, workdir: Path, kind: str
) -> None:
    # Given a fork at every point
    system = start_armed_worker(CHILDREN)
    paused = start_paused_forks(system, fault_points, guests, workdir)
    with system.scheduler.watching(paused[0].fork_id) as first, system.scheduler.watching(paused[-1].fork_id) as last:
        # When Redis refuses writes while all forks continue
        REFUSALS[kind].begin(system.scheduler)
        with pytest.raises(ResponseError):
            system.scheduler.redis.set("more", "x", ex=60)
        resume(paused)
        system.scheduler.wait_refused(3 * len(paused))
        assert not [
            one.point for one in paused if system.scheduler.results.states.get(one.fork_id)["status"] == "FAILURE"
        ]
        REFUSALS[kind].end(system.scheduler.redis)

        # Then
        for one in paused:
            one.wait_for_success(system.scheduler)
    for records in (first, last):
        assert "FAILURE" not in states(records)
    assert system.worker.running
    assert_served_and_clean(system, guests, workdir)


def test_a_fork_whose_result_redis_refuses_for_good_ends_with_its_answer(
    own_scheduler: Scheduler, start_worker: StartWorker, guests: Guests, workdir: Path, mounts: Path
) -> None:
    # Given a key of another type where the result is to be
    worker = start_worker(mounts, 1)
    own_scheduler.redis.rpush("forkvm:odd:result", "x")
    own_scheduler.redis.expire("forkvm:odd:result", 60)

    sent = own_scheduler.send({"source": str(guests.small), "destination": str(workdir / "fork")}, "odd")

    wait_until(lambda: own_scheduler.results.states.get(sent.id)["status"] == "FAILURE", "the end")
    (message,) = own_scheduler.results.states.get(sent.id)["result"]["exc_message"]
    assert message.startswith(f"io_error: {workdir / 'fork'}: Redis refused to store how it ended")
    assert "WRONGTYPE" in message
    own_scheduler.wait_quiet()
    assert worker.running
