"""The endpoint of a real worker: metrics, and the two probes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from pathlib import Path
from urllib.error import HTTPError

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tasks.names import ESTIMATE_TASK
from tests.fixtures.filesystems import Fresh
from tests.fixtures.processes import StartWorker, Worker, wait_until
from tests.support.guests import make_guest
from tests.support.requirements import require_command
from tests.support.system import queued_campaigns
from tests.support.system.queued_campaigns import request_of
from tests.support.system.scheduler import QUEUE, Scheduler
from tests.support.system.systems import SMALL_LIMITS, StartSystem, System, send
from worker.exit_codes import BAD_CALL

SECRET = "a-guests-secret"
HTTP = {"FORKVM_HTTP": "127.0.0.1:0"}
#: For the module's worker.
LIMITS = SMALL_LIMITS | HTTP


class Endpoint:
    """The endpoint of a worker."""

    def __init__(self, worker: Worker) -> None:
        found = re.search(r'/readyz at (http://[^\s"]+)', worker.output())
        assert found, worker.output()
        self.url = found[1]
        wait_until(lambda: self.get("/metrics")[0] == HTTPStatus.OK, "the first page of metrics")

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(self.url + path, timeout=30) as answer:
                return answer.status, answer.read().decode()
        except HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def value(self, name: str, **labels: str) -> float:
        samples = (sample for f in text_string_to_metric_families(self.get("/metrics")[1]) for sample in f.samples)
        return next((s.value for s in samples if s.name == name and s.labels.items() >= labels.items()), 0.0)

    def wait_for(self, name: str, condition: Callable[[float], bool], **labels: str) -> None:
        wait_until(lambda: condition(self.value(name, **labels)), f"{name} {labels}")


@pytest.fixture
def endpoint(system: System) -> Endpoint:
    return Endpoint(system.worker)


def test_forks_and_campaigns_are_counted(
    system: System, endpoint: Endpoint, scheduler: Scheduler, fresh: Fresh
) -> None:
    # Given
    directory = fresh("xfs")
    make_guest(directory / "a")
    reflinked = endpoint.value("forkvm_files_total", method="reflink")

    # When
    result = scheduler.fork(directory / "a", directory / "b")
    scheduler.wait_failed(scheduler.send({"source": str(directory / "a"), "destination": str(directory / "b")}))
    request = request_of(directory / "a", directory, 3, labels={"token": SECRET})
    queued_campaigns.send(scheduler, request, "counted").get(timeout=60)
    scheduler.redis.lpush(QUEUE, b"[]")

    # Then
    endpoint.wait_for("forkvm_rejected_messages_total", lambda n: n == 1, reason="malformed")
    endpoint.wait_for("forkvm_campaigns_total", lambda n: n == 1, status="succeeded")
    assert endpoint.value("forkvm_forks_total", status="succeeded", code="", campaign="no") == 1
    assert endpoint.value("forkvm_forks_total", status="failed", code="destination_exists", campaign="no") == 1
    assert endpoint.value("forkvm_forks_total", status="succeeded", code="", campaign="yes") == 3
    assert endpoint.value("forkvm_files_total", method="reflink") - reflinked == 4 * result["files"]["reflinked"]
    assert endpoint.value("forkvm_fork_duration_seconds_count", phase="total") == 1
    for number in (1, 2, 3):
        system.worker.wait_for_output(f"fork counted.{number} succeeded: ")  # at the level DEBUG
    assert SECRET not in system.worker.output()
    promtool = require_command("promtool", "the check of the metrics")
    checked = subprocess.run(
        [promtool, "check", "metrics"], input=endpoint.get("/metrics")[1], capture_output=True, text=True, timeout=60
    )
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


def test_refused_reflinks_are_counted_by_filesystems(endpoint: Endpoint, scheduler: Scheduler, fresh: Fresh) -> None:
    directory = fresh("ext4")
    make_guest(directory / "a")

    scheduler.fork(directory / "a", directory / "b")

    pair = {"source_filesystem": "ext4", "destination_filesystem": "ext4"}
    endpoint.wait_for("forkvm_fallbacks_total", lambda n: n == 1, errno="EOPNOTSUPP", **pair)


def test_the_pool_queues_and_roots_are_shown(
    system: System, endpoint: Endpoint, scheduler: Scheduler, large_source: Path, workdir: Path
) -> None:
    endpoint.wait_for("forkvm_children", lambda n: n == 2)
    endpoint.wait_for("forkvm_root_free_bytes", lambda n: n > 0)
    children = system.worker.children
    sent = scheduler.send({"source": str(large_source), "destination": str(workdir / "b")})

    try:
        _stop_while_one_reads(large_source, children)
        endpoint.wait_for("forkvm_forks_in_progress", lambda n: n == 1)
        endpoint.wait_for("forkvm_children_busy", lambda n: n > 0)
        wait_until(
            lambda: any(
                endpoint.value("forkvm_unacked_messages", queue=queue) > 0 for queue in (QUEUE, f"{QUEUE}#chunk")
            ),
            "a message that is not acknowledged",
        )
        assert endpoint.get("/readyz") == (200, "ready\n")
    finally:
        send(children, signal.SIGCONT)
    scheduler.wait(sent)


def test_an_estimate_is_not_a_fork_in_progress(
    system: System, endpoint: Endpoint, scheduler: Scheduler, large_source: Path
) -> None:
    children = system.worker.children
    request = {"source": str(large_source), "destination": str(large_source.parent / "b")}
    sent = [scheduler.app.send_task(ESTIMATE_TASK, [request], queue=QUEUE) for _ in range(20)]

    try:
        _stop_while_one_reads(large_source, children)
        names = "forkvm_children_busy", "forkvm_forks_in_progress"  # the last page may be older than the estimates
        wait_until(lambda: [endpoint.value(name) > 0 for name in names] == [True, False], "only an estimate")
    finally:
        send(children, signal.SIGCONT)
    for estimate in sent:
        assert estimate.get(timeout=60)


def _stop_while_one_reads(source: Path, children: list[int]) -> None:
    """Stop the pool processes while one has a file or directory of `source` open."""

    def stopped_while_one_reads() -> bool:
        send(children, signal.SIGSTOP)
        if any(link.startswith(f"{source}/") for pid in children for link in open_files(pid)):
            return True
        send(children, signal.SIGCONT)  # between two tasks
        return False

    wait_until(stopped_while_one_reads, "a pool process that reads the source")


def test_the_pool_processes_do_not_hold_the_listener(system: System, endpoint: Endpoint) -> None:
    port = f"{int(endpoint.url.rpartition(':')[2]):04X}"
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()]
    (inode,) = {row[9] for row in rows if row[1].endswith(f":{port}") and row[3] == "0A"}

    def holders() -> list[int]:
        pids = [system.worker.pid, *system.worker.children]
        return [pid for pid in pids if f"socket:[{inode}]" in open_files(pid)]

    assert holders() == [system.worker.pid]


def open_files(pid: int) -> list[str]:
    """What the descriptors of a process lead to. One that is closed meanwhile is left out."""
    links = []
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            links.append(os.readlink(path))
    return links


def test_no_count_is_lost_when_pool_processes_are_killed_and_replaced(start_system: StartSystem, fresh: Fresh) -> None:
    # Given
    system = start_system(HTTP)
    endpoint, scheduler = Endpoint(system.worker), system.scheduler
    directory = fresh("xfs")
    make_guest(directory / "a")
    descriptors = len(list(Path(f"/proc/{system.worker.pid}/fd").iterdir()))

    # When
    forks = [scheduler.send({"source": str(directory / "a"), "destination": f"{directory}/b-{n}"}) for n in range(40)]
    for sent in forks[::8]:
        scheduler.wait(sent)
        send(system.worker.children[:1], signal.SIGKILL)
    for sent in forks:
        scheduler.wait(sent)

    # Then
    endpoint.wait_for("forkvm_forks_total", lambda n: n >= 40, status="succeeded", campaign="no")
    scheduler.wait_quiet()
    assert endpoint.value("forkvm_forks_total", status="succeeded", campaign="no") == 40
    endpoint.wait_for("forkvm_children", lambda n: n == 2)
    wait_until(
        lambda: len(list(Path(f"/proc/{system.worker.pid}/fd").iterdir())) <= descriptors + 2,
        "descriptors of dead processes to be closed",
    )


def test_a_takeover_and_the_deliveries_before_it_are_counted_and_logged(
    start_system: StartSystem, large_source: Path, workdir: Path
) -> None:
    # Given a process that is paused while it clones, so that it gives no heartbeat
    system = start_system(LIMITS | {"FORKVM_LOG": "json", "FORKVM_VISIBILITY_TIMEOUT": "5"}, concurrency=2)
    endpoint, scheduler = Endpoint(system.worker), system.scheduler
    sent = scheduler.send({"source": str(large_source), "destination": str(workdir / "b")}, "taken")
    children = system.worker.children
    _stop_while_one_reads(large_source, children)
    (paused, *_) = [pid for pid in children if any(f"{large_source}/" in link for link in open_files(pid))]
    send([pid for pid in children if pid != paused], signal.SIGCONT)

    # When
    scheduler.wait(sent, 90)
    send([paused], signal.SIGCONT)

    # Then
    endpoint.wait_for("forkvm_takeovers_total", lambda n: n == 1)
    endpoint.wait_for("forkvm_retries_total", lambda n: n > 0, reason="held")
    lines = [json.loads(line) for line in system.worker.output().splitlines()]
    (takeover,) = (line for line in lines if "was taken from a process" in line["event"])
    assert (takeover["level"], takeover["fork_id"]) == ("warning", "taken")
    scheduler.wait_quiet()


def test_without_redis_a_worker_is_alive_and_not_ready(start_system: StartSystem, fresh: Fresh) -> None:
    system = start_system(HTTP)
    endpoint = Endpoint(system.worker)
    wait_until(lambda: endpoint.get("/readyz") == (200, "ready\n"), "a ready worker")

    system.server.kill()

    wait_until(lambda: endpoint.get("/readyz") == (503, "not connected to Redis\n"), "a worker that is not ready")
    assert endpoint.get("/livez") == (200, "alive\n")
    system.server.start()
    wait_until(lambda: endpoint.get("/readyz") == (200, "ready\n"), "a worker that is ready again")


@pytest.mark.long
def test_with_a_redis_that_hangs_a_worker_is_alive_and_not_ready_and_loses_no_fork(
    start_system: StartSystem, fresh: Fresh
) -> None:
    # Given forks that run and that wait
    system = start_system(HTTP)
    endpoint, scheduler = Endpoint(system.worker), system.scheduler
    directory = fresh("xfs")
    make_guest(directory / "a")
    forks = [scheduler.send({"source": str(directory / "a"), "destination": f"{directory}/b-{n}"}) for n in range(50)]
    scheduler.wait(forks[0])

    # When Redis accepts connections and answers nothing, for longer than a loop that hangs is taken for alive
    send([system.server.pid], signal.SIGSTOP)
    try:
        answers = set()

        def has_tried_for_long() -> bool:
            answers.add(endpoint.get("/livez"))
            return system.worker.output().count("Trying again in") >= 3

        wait_until(has_tried_for_long, "three attempts to connect", 120)
        assert answers == {(200, "alive\n")}
        assert endpoint.get("/readyz") == (503, "not connected to Redis\n")
    finally:
        send([system.server.pid], signal.SIGCONT)

    # Then
    for sent in forks:
        wait_until(lambda sent=sent: scheduler.results.final.fork(sent.id) is not None, f"the end of {sent.id}")  # type: ignore[misc]
        result = scheduler.results.final.fork(sent.id)
        assert result is not None
        assert result["error"] is None
    scheduler.wait_quiet()
    wait_until(lambda: endpoint.get("/readyz") == (200, "ready\n"), "a worker that is ready again")


def test_an_address_in_use_ends_a_worker_with_one_line(
    endpoint: Endpoint, start_worker: StartWorker, mounts: Path
) -> None:
    address = endpoint.url.removeprefix("http://")

    worker = start_worker(mounts, env={"FORKVM_HTTP": address}, wait=False)

    assert worker.wait() == BAD_CALL
    lines = [line for line in worker.output().splitlines() if line.startswith("forkvm:")]
    assert lines == [f"forkvm: FORKVM_HTTP: cannot listen at {address}: Address already in use"]
