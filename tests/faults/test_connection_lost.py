"""The connection between the worker and Redis is cut, broken off mid-reply or slow while forks are made."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.fault_points import INLINE
from tests.faults.paused_forks import Guests, PausedFork, assert_served_and_clean
from tests.fixtures.processes import ROOT, StartWorker, wait_until
from tests.support.system.queued_campaigns import assert_results_are_consistent, paths_of, request_of, result_of, send
from tests.support.system.redis_proxy import Proxy
from tests.support.system.scheduler import TIMEOUT, Scheduler
from tests.support.system.systems import System

#: Forks that are sent, one per step; between two steps a fault of the connection is injected.
FORKS = 24
#: Forks of the campaign.
FANNED_OUT = 200
SEED = 3


def test_forks_and_campaigns_over_a_bad_connection_end_with_their_true_results(
    own_scheduler: Scheduler, start_worker: StartWorker, mounts: Path, guests: Guests, workdir: Path
) -> None:
    rng = random.Random(SEED)
    with Proxy(own_scheduler.server.socket) as proxy:
        address = f"redis+socket://{proxy.socket}"
        worker = start_worker(
            mounts,
            env={
                "FORKVM_BROKER_URL": address,
                "FORKVM_RESULT_BACKEND": address,
                "FORKVM_INLINE_FILES": "4",
                "FORKVM_CHUNK_FILES": "8",
                "FORKVM_VISIBILITY_TIMEOUT": "5",
            },
        )
        system = System(own_scheduler.server, worker, own_scheduler)

        # Given a bad connection, and a campaign in small batches and forks that are sent over it
        (workdir / "many").mkdir()
        many = request_of(guests.small, workdir / "many", FANNED_OUT, max_parallel=4)
        send(own_scheduler, many, "many")
        forks = []
        for n in range(FORKS):
            source = guests.large if n % 3 == 0 else guests.small
            fork = PausedFork(INLINE, f"fork-{n}", source, workdir / f"fork-{n}", 0)
            _send(system, fork)
            forks.append(fork)
            proxy.delay = rng.choice([0.0, 0.0, 0.002, 0.02])
            fault = rng.choice([proxy.cut, proxy.halve, None])
            if fault is not None:
                fault()
            time.sleep(rng.uniform(0.05, 0.6))
        proxy.delay = 0.0
        assert proxy.cuts > FORKS // 4

        # Then all of them are made. A message that Redis sent to a connection that was cut at that moment is lost. The
        # sweep sends it again if a worker had claimed the fork; otherwise its client does
        for fork in forks:
            if own_scheduler.results.claims.get(fork.fork_id) is None:
                _send(system, fork)
        if own_scheduler.results.claims.get("many") is None:
            send(own_scheduler, many, "many")
        for fork in forks:
            fork.wait_for_success(own_scheduler)
        wait_until(lambda: own_scheduler.results.final.get("many") is not None, "the campaign's result", TIMEOUT)
        made = assert_results_are_consistent(
            own_scheduler, result_of(own_scheduler, "many"), paths_of(workdir / "many", FANNED_OUT)
        )
        assert {fork["status"] for fork in made} == {"succeeded"}
        assert worker.running
        assert_served_and_clean(system, guests, workdir)


@pytest.mark.parametrize(("mode", "left"), [("patched", 0), ("unpatched", 2)])  # 2: kombu has the bug still
def test_a_channel_whose_last_answer_is_an_error_of_a_failover_leaves_no_sockets(
    own_scheduler: Scheduler, mode: str, left: int
) -> None:
    program = [sys.executable, "-m", "tests.support.system.closed_channel", str(own_scheduler.server.socket), mode]

    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=60)

    assert (done.stdout, done.stderr) == (f"{left}\n", "")


def _send(system: System, fork: PausedFork) -> None:
    system.scheduler.send({"source": str(fork.source), "destination": str(fork.destination)}, fork.fork_id)
