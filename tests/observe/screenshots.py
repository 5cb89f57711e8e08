"""The pictures in docs/pictures: `forkvm top` and `queues` in real terminals, reports in a real browser.

`make screenshots` makes them again. A worker copies with a bound on its rate meanwhile, so that jobs are under way.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from tests.fixtures.filesystems import Fresh
from tests.fixtures.processes import ROOT, RunForkvm, StartWorker, forkvm_script, program_environment, wait_until
from tests.fixtures.redis_server import RedisServer
from tests.observe.photographs import Theme, photograph_page, photograph_terminal, terminal
from tests.support.guests import MIB, GuestSizes, make_guest

PICTURES = ROOT / "docs/pictures"
#: Chunks of this size, and copies of this many bytes a second: a fork of `GUEST` then takes a minute.
SLOW = {"FORKVM_INLINE_BYTES": "0", "FORKVM_CHUNK_BYTES": str(64 * MIB), "FORKVM_COPY_RATE": str(12 * MIB)}
GUEST = GuestSizes(overlay=2048 * MIB, overlay_data=512 * MIB, memory=512 * MIB, memory_data=256 * MIB)
#: Most bytes of a picture.
LIMIT = 150_000
_TIMEOUT = 60.0

Environment = dict[str, str]


@pytest.fixture
def srv(fresh: Fresh) -> Iterator[Path]:
    """/srv of this run's mount namespace: pictures show paths as an operator has them."""
    subprocess.run(["mount", "--bind", fresh("xfs"), "/srv"], check=True)
    try:
        yield Path("/srv")
    finally:
        subprocess.run(["umount", "/srv"], check=True)


@pytest.fixture
def environment(redis_server: RedisServer, srv: Path, tmp_path: Path) -> Environment:
    runtime = {"FORKVM_RUNTIME_DIR": str(tmp_path), "TERM": "xterm-256color", "LANG": "C.UTF-8"}
    path = f"{Path(forkvm_script()).parent}{os.pathsep}{os.environ['PATH']}"
    return program_environment(redis_server, srv) | runtime | {"PATH": path}


def _send(client: Celery, job_id: str, task: str = "forkvm.fork", **request: Any) -> Any:
    return client.send_task(task, kwargs={"request": request}, task_id=job_id, queue="forkvm")


@contextlib.contextmanager
def _busy_domain(
    srv: Path, environment: Environment, start_worker: StartWorker, run_forkvm: RunForkvm, client: Celery
) -> Iterator[None]:
    """A domain with forks and a campaign under way, others that wait, and a worker that was killed."""
    for name in ("vm-host-2", "vm-host-1"):
        worker = start_worker(srv, 4, env=environment | SLOW | {"FORKVM_NAME": name})
        if name == "vm-host-2":
            worker.kill()
    jobs = [
        _send(client, f"fork-{n}", source="/srv/snapshot-7", destination=f"/srv/guests/vm-{n}", reflink="never")
        for n in range(17, 20)
    ]
    fields = {"template": "/srv/guests/web-{n:04}", "count": 500}
    jobs.append(_send(client, "web", "forkvm.campaign", source="/srv/small", destinations=fields, reflink="never"))
    # An id as `forkvm submit` makes it.
    destination = "/srv/guests/a-guest-with-a-long-name-of-its-own/2026-11-27T17:26:02Z"
    request = {"source": "/srv/snapshot-7", "destination": destination, "reflink": "never"}
    jobs.append(_send(client, uuid.UUID(int=0x6F9619FF8B86D011B42D00CF4FC964FF).hex, **request))
    for n in range(20, 30):
        submitted = run_forkvm("submit", "/srv/small", f"/srv/guests/vm-{n}", "--id", f"fork-{n}", env=environment)
        assert submitted.returncode == 0
    try:
        yield
    finally:
        for job in jobs:
            assert run_forkvm("cancel", job.id, env=environment).returncode == 0
        for job in jobs:
            job.get(timeout=_TIMEOUT, propagate=False)


def test_terminals(
    srv: Path,
    environment: Environment,
    start_worker: StartWorker,
    run_forkvm: RunForkvm,
    foreign_client: Celery,
    tmp_path: Path,
) -> None:
    make_guest(srv / "snapshot-7", GUEST)
    make_guest(srv / "small")
    (srv / "guests/a-guest-with-a-long-name-of-its-own").mkdir(parents=True)
    with _busy_domain(srv, environment, start_worker, run_forkvm, foreign_client):
        for name, columns, rows, script, last in (
            ("queues-80", 80, 40, "echo '$ forkvm queues'; forkvm queues", "does not answer"),
            ("queues-200", 200, 40, "echo '$ forkvm queues'; forkvm queues", "does not answer"),
            ("top-80", 80, 24, "forkvm top", "In progress"),
            ("top-200", 200, 34, "forkvm top", "In progress"),
        ):
            with terminal(columns, rows, script, environment) as shown:
                wait_until(lambda s=shown, last=last: last in s.screen(), f"{last!r} in {name}", _TIMEOUT)  # type: ignore[misc]
                photograph_terminal(shown, PICTURES / f"{name}.png", tmp_path)
            assert (PICTURES / f"{name}.png").stat().st_size < LIMIT


def test_reports(
    srv: Path,
    environment: Environment,
    start_worker: StartWorker,
    run_forkvm: RunForkvm,
    foreign_client: Celery,
    tmp_path: Path,
) -> None:
    make_guest(srv / "snapshot-7")
    for number in (17, 400):
        (srv / "guests" / f"vm-{number:04}").mkdir(parents=True)
    start_worker(srv, 2, env=environment)
    fields = {"template": "/srv/guests/vm-{n:04}", "count": 500}
    campaign = _send(foreign_client, "fan-out-4", "forkvm.campaign", source="/srv/snapshot-7", destinations=fields)
    campaign.get(timeout=_TIMEOUT)
    request = {"source": "/srv/snapshot-7", "destination": "/srv/guests/vm-1"}
    failed = _send(foreign_client, "fork-17", **request, max_copied_bytes=0, reflink="never")
    failed.get(timeout=_TIMEOUT, propagate=False)

    windows: tuple[tuple[str, str, int, int, Theme], ...] = (
        ("fan-out-4", "report-wide", 1000, 1400, "light"),
        ("fan-out-4", "report-phone", 390, 1760, "dark"),
        ("fork-17", "report-failed", 1000, 620, "light"),
    )
    for job, name, width, height, theme in windows:
        page = tmp_path / f"{job}.html"
        assert run_forkvm("report", job, "-o", page, env=environment).returncode == 0
        photograph_page(page, PICTURES / f"{name}.png", width, height, theme)
        assert (PICTURES / f"{name}.png").stat().st_size < LIMIT
