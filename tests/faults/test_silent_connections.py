"""Connections to Redis that go silent without being closed, and a heartbeat file that cannot be written."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.faults.paused_forks import Guests
from tests.fixtures.processes import StartWorker, wait_until
from tests.support.system.redis_proxy import Proxy
from tests.support.system.scheduler import Scheduler

#: Seconds within which a worker notices a silent connection, and exits after SIGTERM.
MINUTE = 60.0


def test_worker_whose_connections_go_silent_serves_again_within_a_minute_and_exits_on_sigterm(
    own_scheduler: Scheduler, start_worker: StartWorker, guests: Guests, workdir: Path, mounts: Path
) -> None:
    with Proxy(own_scheduler.server.socket) as proxy:
        address = f"redis+socket://{proxy.socket}"
        worker = start_worker(mounts, env={"FORKVM_BROKER_URL": address, "FORKVM_RESULT_BACKEND": address})
        own_scheduler.fork(guests.small, workdir / "first", "first")

        # When the current connections are dead, and Redis has ended the last BRPOP, which would receive a message
        proxy.silence()
        wait_until(lambda: own_scheduler.redis.info("clients")["blocked_clients"] == 0, "the end of the last BRPOP")
        own_scheduler.send({"source": str(guests.small), "destination": str(workdir / "next")}, "next")

        # Then
        wait_until(lambda: own_scheduler.results.states.get("next")["status"] == "SUCCESS", "the next fork", MINUTE)
        own_scheduler.wait_quiet()

        # and when Redis cannot be reached at all
        proxy.is_cut_off = True
        worker.term()
        assert worker.wait(MINUTE) == 0


def test_worker_that_also_consumes_another_domains_queue_makes_large_forks_there(
    own_scheduler: Scheduler, start_worker: StartWorker, guests: Guests, workdir: Path, mounts: Path
) -> None:
    worker = start_worker(mounts, env={"FORKVM_INLINE_FILES": "4", "FORKVM_CHUNK_FILES": "8"})
    request = {"source": str(guests.large), "destination": str(workdir / "fork")}

    own_scheduler.app.control.add_consumer("forkvm.other")
    own_scheduler.app.send_task("forkvm.fork", kwargs={"request": request}, task_id="other", queue="forkvm.other")

    assert own_scheduler.wait(own_scheduler.app.AsyncResult("other"))["chunks"] > 1
    worker.term()
    assert worker.wait() == 0
    own_scheduler.redis.delete("forkvm.other#chunk")  # a sweep that no worker takes any more


def test_heartbeat_file_that_cannot_be_written_is_an_error_at_the_start(
    own_scheduler: Scheduler, start_worker: StartWorker, mounts: Path, tmp_path: Path
) -> None:
    path = tmp_path / "missing" / "heartbeat"

    worker = start_worker(mounts, 1, env={"FORKVM_HEARTBEAT_FILE": str(path)}, wait=False)

    assert worker.wait() == 2
    lines = [line for line in worker.output().splitlines() if line.startswith("forkvm: ")]
    assert lines == [f"forkvm: FORKVM_HEARTBEAT_FILE: {path} cannot be written: No such file or directory"]


def test_heartbeat_file_that_cannot_be_written_later_is_one_warning(
    own_scheduler: Scheduler, start_worker: StartWorker, guests: Guests, workdir: Path, mounts: Path, tmp_path: Path
) -> None:
    path = tmp_path / "hidden" / "heartbeat"
    path.parent.mkdir()
    worker = start_worker(mounts, 1, env={"FORKVM_HEARTBEAT_FILE": str(path)})
    wait_until(path.exists, "the heartbeat")

    shutil.rmtree(path.parent)

    wait_until(lambda: "heartbeat file" in worker.output(), "the warning")
    own_scheduler.fork(guests.small, workdir / "fork")
    path.parent.mkdir()
    wait_until(path.exists, "the heartbeat, written again")
    assert worker.output().count("heartbeat file") == 1
    assert "Connection to broker lost" not in worker.output()
