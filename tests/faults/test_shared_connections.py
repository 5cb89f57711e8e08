"""A child that is started after its worker has connected to Redis does not share the worker's connections."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path

from tests.faults.paused_forks import Guests
from tests.fixtures.processes import StartWorker, Worker, wait_until
from tests.support.processor import wait_until_asleep
from tests.support.system.scheduler import UNACKED, Scheduler
from tests.support.system.systems import send

#: Far more forks than it takes until a worker that reads from the wrong connection hangs.
FORKS = 100


def test_worker_whose_idle_connection_is_closed_reconnects_and_continues(
    own_scheduler: Scheduler, start_worker: StartWorker, mounts: Path, guests: Guests, workdir: Path
) -> None:
    # Given a worker whose one child is a replacement. It sends no sweep: the child could be given it before the fork
    # that is to be delayed
    worker = start_worker(mounts, 1, env={"FORKVM_VISIBILITY_TIMEOUT": "600"})
    wait_until(lambda: _waiting(own_scheduler) != [], "the worker to wait for messages")
    first = worker.children
    send(first, signal.SIGKILL)
    wait_until(lambda: worker.children not in (first, []), "another child")
    own_scheduler.fork(guests.small, workdir / "fork")

    # When Redis closes the connection while the child has all messages that the worker may take
    child = worker.children
    send(child, signal.SIGSTOP)
    delayed = own_scheduler.send({"source": str(guests.small), "destination": str(workdir / "held-up")})
    wait_until(lambda: own_scheduler.messages()[UNACKED] == 1, "the message to be taken")
    before = _sockets(worker)
    (idle,) = _waiting(own_scheduler)
    own_scheduler.redis.client_kill_filter(_id=idle)
    wait_until(lambda: _sockets(worker) < before, "the worker to close its end")

    # Then the worker sleeps, and takes all messages that follow
    wait_until_asleep(lambda: [worker.pid], "a worker that waits")
    send(child, signal.SIGCONT)
    own_scheduler.wait(delayed)
    sent = [
        own_scheduler.send({"source": str(guests.small), "destination": str(workdir / f"fork-{n}")})
        for n in range(FORKS)
    ]
    for fork in sent:
        own_scheduler.wait(fork)
    worker.term()
    assert worker.wait(15) == 0


def _waiting(scheduler: Scheduler) -> list[str]:
    """The ids of the connections on which a worker waits for messages."""
    return [client["id"] for client in scheduler.redis.client_list() if client["cmd"] == "brpop"]


def _sockets(worker: Worker) -> int:
    """The number of open sockets of the worker's main process."""
    count = 0
    for entry in Path(f"/proc/{worker.pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            count += os.readlink(entry).startswith("socket:")
    return count
