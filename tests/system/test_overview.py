"""`forkvm queues` and `forkvm top` beside a fork that is half done."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from socket import gethostname
from typing import Any

from tasks.names import FORK_TASK
from tasks.store.queues import lists_of
from tests.fixtures.processes import RunForkvm, ended_at_exit, forkvm_script, program_environment, wait_until
from tests.support.system.staging_view import StagingView
from tests.support.system.systems import System, stopped_in_the_middle
from worker.client import Client
from worker.settings import Settings

RUNBOOK = Path(__file__).parents[2] / "docs" / "runbook.md"


def _client(system: System, domain: str = "") -> Client:
    server = system.server
    return Client(Settings(broker_url=server.broker_url, result_backend=server.backend_url, domain=domain))


def test_an_overview_shows_the_messages_jobs_and_workers_of_its_domain(
    system: System, large_source: Path, workdir: Path
) -> None:
    # Given a fork whose children are stopped, and messages in the queue of a domain without workers
    request = {"source": str(large_source), "destination": str(workdir / "b")}
    here, nowhere = _client(system), _client(system, "nowhere")
    for age in (100, 500):
        headers = {"sent_at": time.time() - age}
        system.scheduler.app.send_task(FORK_TASK, kwargs={"request": request}, queue="forkvm.nowhere", headers=headers)
    sent = system.scheduler.send(request, "half")
    with stopped_in_the_middle(system.worker, StagingView(workdir, "half")):
        # When
        found, other = here.overview(), nowhere.overview()
    system.scheduler.redis.delete("forkvm.nowhere")
    system.scheduler.wait(sent)

    # Then
    queues = {queue.name: queue for queue in found.queues}
    assert set(queues) == {"forkvm", "forkvm#batch", "forkvm#chunk", "forkvm#finish"}
    assert queues["forkvm#chunk"].waiting > 0
    assert queues["forkvm#chunk"].unacked > 0
    assert queues["forkvm"].waiting == 0
    (worker,) = found.workers
    assert (worker.version, worker.queues, worker.children) == (version("forkvm"), ["forkvm"], 2)
    assert (worker.busy or 0) + (worker.idle or 0) == 2
    assert (worker.answers, worker.ending, worker.host) == (True, False, gethostname())
    assert 0 <= worker.heartbeat_seconds < 30
    (job,) = found.jobs
    assert (found.forks, found.campaigns) == (1, 0)
    assert (job.id, job.kind, job.destination) == ("half", "fork", str(workdir / "b"))
    assert (other.forks, other.workers, other.queues[0].waiting) == (0, [], 2)
    assert 500 <= (other.queues[0].oldest_seconds or 0) < 600


def test_messages_of_every_priority_are_counted_and_known(system: System, run_forkvm: RunForkvm) -> None:
    # Given a message of each priority in the queue of a domain without workers
    request = {"source": "/a", "destination": "/b"}
    for priority in range(10):
        options: dict[str, Any] = {
            "task_id": f"priority-{priority}",
            "priority": priority,
            "headers": {"sent_at": time.time() - 100},
        }
        system.scheduler.app.send_task(FORK_TASK, kwargs={"request": request}, queue="forkvm.nowhere", **options)

    # When
    client = _client(system, "nowhere")
    queue = client.overview().queues[0]
    known = [client.is_known(job_id, client.status(job_id)) for job_id in ("priority-0", "priority-4", "priority-9")]
    environment = program_environment(system.server) | {"FORKVM_DOMAIN": "nowhere"}
    shown = run_forkvm("status", "priority-9", env=environment)
    system.scheduler.redis.delete(*lists_of("forkvm.nowhere"))

    # Then
    assert queue.waiting == 10
    assert queue.oldest_seconds is not None
    assert known == [True] * 3
    assert (shown.returncode, shown.stdout) == (0, "priority-9: PENDING; waiting in the queue\n")


def test_queues_prints_the_overview(system: System, run_forkvm: RunForkvm) -> None:
    done = run_forkvm("queues", "--domain", "nowhere", env=program_environment(system.server))

    assert (done.returncode, done.stderr) == (0, "forkvm: no worker of forkvm.nowhere answers\n")
    assert "In progress: 0 forks, 0 campaigns" in done.stdout


def test_the_runbook_s_script_shows_domains_without_a_worker(system: System, tmp_path: Path) -> None:
    script = RUNBOOK.read_text().partition("```sh\nfor domain")[2].partition("```")[0]
    directory = "/var/lib/prometheus/node-exporter"
    assert script.count(directory) == 3
    path = f"{Path(forkvm_script()).parent}{os.pathsep}{os.environ['PATH']}"
    system.scheduler.redis.lpush("forkvm.nvme-a", b"{}", b"{}")

    subprocess.run(
        ["bash", "-euc", f"for domain{script}".replace(directory, str(tmp_path))],
        env=program_environment(system.server) | {"PATH": path},
        check=True,
    )
    system.scheduler.redis.delete("forkvm.nvme-a")

    assert (tmp_path / "forkvm.prom").read_text().splitlines() == [
        'forkvm_domain_messages{queue="forkvm.nvme-a"} 2',
        'forkvm_domain_workers{queue="forkvm.nvme-a"} 0',
        'forkvm_domain_messages{queue="forkvm.nvme-b"} 0',
        'forkvm_domain_workers{queue="forkvm.nvme-b"} 0',
    ]


def test_top_shows_the_domain_in_a_terminal_until_ctrl_c(system: System) -> None:
    terminal, other_end = pty.openpty()
    environment = program_environment(system.server) | {"TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
    process = subprocess.Popen(
        [forkvm_script(), "top", "--interval", "1"],
        env=environment,
        stdin=other_end,
        stdout=other_end,
        stderr=other_end,
    )
    os.close(other_end)
    os.set_blocking(terminal, False)
    shown = bytearray()

    def has_shown(text: bytes) -> bool:
        try:
            shown.extend(os.read(terminal, 1 << 16))
        except (BlockingIOError, OSError):
            return text in shown
        return text in shown

    with ended_at_exit(process):
        wait_until(lambda: has_shown(b"of 2 children busy"), "the first reading")
        process.send_signal(signal.SIGINT)
        wait_until(lambda: has_shown(b"\x1b[?1049l"), "the end of the full screen")
        assert process.wait(30) == 0
    os.close(terminal)


def test_top_prints_a_line_of_json_per_reading_until_its_pipe_is_closed(system: System) -> None:
    command = [forkvm_script(), "top", "--json", "--interval", "1"]
    with ended_at_exit(
        subprocess.Popen(command, env=program_environment(system.server), stdout=subprocess.PIPE, text=True)
    ) as process:
        assert process.stdout is not None
        reading = json.loads(process.stdout.readline())
        process.stdout.close()  # as `head` does
        code = process.wait(30)

    assert set(reading) == {"queue", "queues", "forks", "campaigns", "jobs", "workers"}
    assert set(reading["workers"][0]) == {
        *("name", "version", "host", "queues", "children", "busy", "idle"),
        *("answers", "ending", "heartbeat_seconds"),
    }
    assert code == 0
