"""Flower with the project's configuration, with a real worker: what it shows of forks, campaigns and their parts."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from tests.fixtures.filesystems import Fresh
from tests.fixtures.processes import ROOT, StartWorker, ended_at_exit, program_environment, wait_until
from tests.fixtures.redis_server import RedisServer
from tests.observe.prometheus import free_port
from tests.support.guests import make_guest

_CONFIGURATION = ROOT / "deploy/flower/flowerconfig.py"
_TIMEOUT = 60.0


class Flower:
    """The pages and the API of a running Flower."""

    def __init__(self, url: str) -> None:
        self.url = url

    def get(self, path: str) -> Any:
        """The JSON at a path; None if there is none yet."""
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}{path}", timeout=10) as answer:
            return json.loads(answer.read() or b"null")
        return None

    def rows(self) -> dict[str, dict[str, Any]]:
        """The table of tasks on the page, by id."""
        columns = "draw=1&start=0&length=1000&search%5Bvalue%5D=&order%5B0%5D%5Bcolumn%5D=0&order%5B0%5D%5Bdir%5D=asc"
        found = self.get(f"/tasks/datatable?{columns}&columns%5B0%5D%5Bdata%5D=name")
        return {row["uuid"]: row for row in (found or {"data": []})["data"]}

    def refuses(self, path: str) -> bool:
        """Whether a command is refused."""
        request = urllib.request.Request(f"{self.url}{path}", method="POST", data=b"")
        try:
            urllib.request.urlopen(request, timeout=10)
        except urllib.error.HTTPError as error:
            return error.code == 403
        return False


@pytest.fixture
def flower(redis_server: RedisServer, tmp_path: Path) -> Iterator[Flower]:
    port = free_port()
    command = ["-m", "celery", "-A", "worker.app", "flower", f"--conf={_CONFIGURATION}"]
    with (tmp_path / "flower.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, *command, f"--port={port}", "--address=127.0.0.1"],
            cwd=ROOT,
            env=program_environment(redis_server) | {"FLOWER_UNAUTHENTICATED_API": "true"},
            stdout=log,
            stderr=log,
        )
    with ended_at_exit(process):
        yield Flower(f"http://127.0.0.1:{port}")


def test_flower_shows_forks_campaigns_and_their_parts_under_readable_names_with_progress(
    fresh: Fresh, start_worker: StartWorker, foreign_client: Celery, flower: Flower
) -> None:
    guests = fresh("xfs")
    make_guest(guests / "a")
    worker = start_worker(guests, env={"FORKVM_INLINE_BYTES": "0", "FORKVM_CHUNK_BYTES": str(1 << 20)})
    wait_until(lambda: "Events of group {task} enabled by remote." in worker.output(), "Flower's events", _TIMEOUT)

    def send(job: str, task: str = "forkvm.fork", **request: Any) -> Any:
        fields = {"source": str(guests / "a"), "destination": str(guests / job)} | request
        if "destinations" in fields:
            del fields["destination"]
        return foreign_client.send_task(task, kwargs={"request": fields}, task_id=job, queue="forkvm")

    send("inline").get(timeout=60)
    send("none", source=str(guests / "nothing")).get(timeout=60, propagate=False)
    send("many", "forkvm.campaign", destinations=[str(guests / f"many-{n}") for n in range(8)]).get(timeout=60)
    # Large enough for its progress to be seen.
    with (guests / "a" / "large").open("wb") as file:
        for _ in range(64):
            file.write(b"forkvm" * 174_763)  # 1 MiB
    large = send("chunks", reflink="never")
    wait_until(lambda: flower.rows().get("chunks", {}).get("state") == "PROGRESS", "the progress", _TIMEOUT)
    progress = flower.rows()["chunks"]
    send("cancelled")
    foreign_client.control.revoke("cancelled")
    large.get(timeout=60)
    wait_until(lambda: flower.rows()["chunks"]["state"] == "SUCCESS", "the end of the fork in chunks", _TIMEOUT)
    wait_until(lambda: flower.rows().get("cancelled", {}).get("state") == "REVOKED", "the cancelled fork", _TIMEOUT)
    rows = flower.rows()

    shown = {job: (rows[job]["name"], rows[job]["state"]) for job in ("inline", "none", "many", "chunks")}
    assert shown == {
        "inline": ("forkvm.fork", "SUCCESS"),
        "none": ("forkvm.fork", "FAILURE"),
        "many": ("forkvm.campaign (finish)", "SUCCESS"),
        "chunks": ("forkvm.fork (finish)", "SUCCESS"),
    }
    assert progress["name"] == "forkvm.fork"
    assert " of " in progress["result"]
    assert str(guests / "inline") in rows["inline"]["kwargs"]
    assert "source_not_found" in rows["none"]["exception"]
    assert "cancelled" in rows["cancelled"]["exception"]
    assert rows["chunks.chunk.0"]["name"] == "forkvm.fork (chunk)"
    assert rows["many.batch.0"]["name"] == "forkvm.campaign (batch)"
    assert flower.get("/api/task/result/chunks")["result"]["status"] == "succeeded"
    assert flower.refuses("/api/task/revoke/chunks")
