"""Other Celery applications on the same Redis database, and workers of earlier versions of this program."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.faults.paused_forks import Guests
from tests.fixtures.processes import StartWorker, end_group, wait_until
from tests.support.system.scheduler import QUEUE, Scheduler

#: kombu's default keys, which earlier versions used too.
OLD_UNACKED, OLD_INDEX = "unacked", "unacked_index"
TIMEOUT = 5
#: Seconds that the other application's task waits: longer than the timeout plus the interval of checks.
COUNTDOWN = 9

OTHER = """
import os
from celery import Celery
app = Celery("other", broker=os.environ["URL"])
@app.task(name="other.note")
def note():
    with open(os.environ["NOTES"], "a") as notes:
        notes.write("ran\\n")
"""


@contextmanager
def _other_worker(directory: Path, url: str) -> Iterator[Path]:
    """A worker of another application with default settings.

    Yields the file to which its task writes a line for each run.
    """
    (directory / "other.py").write_text(OTHER)
    notes, log = directory / "notes", directory / "other.log"
    notes.touch()
    command = [sys.executable, "-m", "celery", "-A", "other", "worker", "-c", "1", "-Q", "other", "-l", "INFO"]
    environment = os.environ | {"URL": url, "NOTES": str(notes), "PYTHONPATH": str(directory)}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=directory, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        wait_until(lambda: " ready." in log.read_text(), "the other application's worker")
        yield notes
    finally:
        process.terminate()
        process.wait(20)
        end_group(process)


def test_task_of_another_application_runs_once_beside_a_worker(
    own_scheduler: Scheduler, start_worker: StartWorker, mounts: Path, tmp_path: Path
) -> None:
    redis = own_scheduler.redis
    with _other_worker(tmp_path, own_scheduler.server.broker_url) as notes:
        start_worker(mounts, 1, env={"FORKVM_VISIBILITY_TIMEOUT": str(TIMEOUT)})

        own_scheduler.app.send_task("other.note", queue="other", countdown=COUNTDOWN)

        wait_until(lambda: notes.read_text() != "", "the other application's task", 3 * COUNTDOWN)
        wait_until(lambda: not redis.exists(OLD_UNACKED, "other"), "the end of the other application's messages")
        assert notes.read_text().splitlines() == ["ran"]


def test_worker_does_not_receive_revoked_tasks_of_other_applications(
    own_scheduler: Scheduler, start_worker: StartWorker, mounts: Path, tmp_path: Path
) -> None:
    """With mingle and gossip, Celery would exchange lists and events with every worker of the database."""
    with _other_worker(tmp_path, own_scheduler.server.broker_url):
        worker = start_worker(mounts, 1)

        assert "mingle" not in worker.output()
        assert "sync with" not in worker.output()


def test_only_messages_of_a_killed_worker_of_an_earlier_version_are_returned_to_the_queue(
    own_scheduler: Scheduler, start_worker: StartWorker, guests: Guests, workdir: Path, mounts: Path
) -> None:
    # Given messages of a killed and of a running worker of an earlier version, and a message of another application
    redis, now = own_scheduler.redis, time.time()
    ours = _message(
        "forkvm.fork", "ours", {"request": {"source": str(guests.small), "destination": str(workdir / "a")}}
    )
    live = _message(
        "forkvm.fork", "live", {"request": {"source": str(guests.small), "destination": str(workdir / "b")}}
    )
    other = _message("other.note", "other", {})
    held = {
        "ours": (ours, QUEUE, now - 60),
        "inner": (_message("forkvm.sweep", "sweep", {"every": 10}), f"{QUEUE}#chunk", now - 60),
        "domain": (ours, "forkvm.elsewhere", now - 60),
        "live": (live, QUEUE, now + 3600),
        "other": (other, "other", now - 60),
        "almost": (other, "forkvms", now - 60),
        "suffix": (other, "forkvm#other", now - 60),
        "noise": ([], QUEUE, now - 60),
    }
    for tag, (message, queue, taken) in held.items():
        redis.hset(OLD_UNACKED, tag, json.dumps([message, "", queue]))
        redis.zadd(OLD_INDEX, {tag: taken})

    # When a worker of this version starts
    start_worker(mounts, 1, env={"FORKVM_VISIBILITY_TIMEOUT": str(TIMEOUT)})

    # Then
    own_scheduler.wait(own_scheduler.app.AsyncResult("ours"))
    assert set(redis.hkeys(OLD_UNACKED)) == {b"live", b"other", b"almost", b"suffix", b"noise"}
    assert set(redis.zrange(OLD_INDEX, 0, -1)) == set(redis.hkeys(OLD_UNACKED))
    assert redis.llen("forkvm.elsewhere") == 1
    assert not redis.exists("other", "forkvms", "forkvm#other")

    # and when the other worker is killed too
    redis.zadd(OLD_INDEX, {"live": now - 60})
    own_scheduler.wait(own_scheduler.app.AsyncResult("live"))
    redis.delete(OLD_UNACKED, OLD_INDEX, "forkvm.elsewhere")


def _message(task: str, task_id: str, kwargs: dict[str, object]) -> dict[str, object]:
    """A message as kombu stores it."""
    body = base64.b64encode(json.dumps([[], kwargs, {}]).encode()).decode()
    return {
        "body": body,
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {"lang": "py", "task": task, "id": task_id, "root_id": task_id, "parent_id": None},
        "properties": {
            "correlation_id": task_id,
            "delivery_mode": 2,
            "delivery_tag": task_id,
            "body_encoding": "base64",
            "delivery_info": {"exchange": "", "routing_key": QUEUE},
        },
    }
