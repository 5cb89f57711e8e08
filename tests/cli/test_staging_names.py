"""A fork is refused under a name that staging uses, since gc would remove it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from celery import Celery

from tests.fixtures.filesystems import Fresh
from tests.fixtures.processes import RunForkvm, StartWorker, program_environment
from tests.fixtures.redis_server import RedisServer

NAME = ".forkvm-0123456789abcdef"


@pytest.fixture
def workdir(fresh: Fresh) -> Path:
    """A directory with a guest, and with a directory whose name looks like a staging name."""
    workdir = fresh("tmpfs")
    (workdir / "vm-1").mkdir()
    (workdir / "vm-1/state").write_text("running")
    (workdir / f"{NAME}.01234567").mkdir()
    return workdir


DESTINATIONS = [NAME, f"{NAME}.01234568", f"{NAME}.01234567/vm-2"]


@pytest.mark.parametrize("name", DESTINATIONS)
def test_local_fork_is_a_bad_call(name: str, run_forkvm: RunForkvm, workdir: Path) -> None:
    before = sorted(workdir.rglob("*"))

    done = run_forkvm("fork", workdir / "vm-1", workdir / name, "--json")

    assert done.returncode == 2
    assert json.loads(done.stdout)["error"]["code"] == "invalid_request"
    assert sorted(workdir.rglob("*")) == before


@pytest.mark.parametrize("name", DESTINATIONS)
def test_local_campaign_is_a_bad_call_before_any_fork(name: str, run_forkvm: RunForkvm, workdir: Path) -> None:
    (workdir / "list").write_text(f"{workdir}/vm-2\n{workdir}/{name}\n")
    before = sorted(workdir.rglob("*"))

    by_list = run_forkvm("campaign", workdir / "vm-1", "--to-file", workdir / "list", "--local")
    by_template = run_forkvm("campaign", workdir / "vm-1", "--to", workdir / name / "vm-{n}", "--count", "2", "--local")

    assert (by_list.returncode, by_template.returncode) == (2, 2)
    assert "looks like a staging name" in by_list.stderr
    assert sorted(workdir.rglob("*")) == before


def test_worker_refuses_a_staging_name_that_a_client_did_not_check(
    start_worker: StartWorker,
    redis_server: RedisServer,
    foreign_client: Celery,
    run_forkvm: RunForkvm,
    workdir: Path,
) -> None:
    environment = program_environment(redis_server, workdir)
    start_worker(workdir)
    requests = {
        "f1": ("forkvm.fork", {"source": f"{workdir}/vm-1", "destination": f"{workdir}/{NAME}"}),
        "f2": ("forkvm.fork", {"source": f"{workdir}/{NAME}.01234567", "destination": f"{workdir}/vm-2"}),
        "c1": (
            "forkvm.campaign",
            {"source": f"{workdir}/vm-1", "destinations": [f"{workdir}/vm-3", f"{workdir}/{NAME}"]},
        ),
    }
    before = sorted(workdir.rglob("*"))

    for job_id, (task, request) in requests.items():
        foreign_client.send_task(task, kwargs={"request": request}, task_id=job_id, queue="forkvm")

    for job_id in requests:
        done = run_forkvm("status", job_id, "--watch", "--json", env=environment)
        assert json.loads(done.stdout)["result"]["error"]["code"] == "invalid_request"
    assert sorted(workdir.rglob("*")) == before
