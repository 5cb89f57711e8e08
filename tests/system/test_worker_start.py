"""How a worker starts, what it refuses to start with, and what it refuses to read."""

from __future__ import annotations

import base64
import itertools
import json
import pickle
import re
import socket
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.filesystems import Fresh
from tests.fixtures.processes import ROOT, StartWorker, program_environment, wait_until
from tests.fixtures.redis_server import RedisServer
from tests.support.guests import make_guest
from tests.support.system.scheduler import QUEUE, Scheduler
from tests.support.system.systems import StartSystem, System

_REFUSED = "a message in the queue forkvm was refused: "
COMMAND = [sys.executable, "-m", "celery", "-A", "worker.app", "worker", "-Q", "forkvm", "--concurrency", "1"]


def _run_to_the_end(server: RedisServer, roots: Path | tuple[()], **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        COMMAND,
        cwd=ROOT,
        env=program_environment(server, roots) | env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30,
    )


def test_two_workers_of_one_host_have_names_of_their_own_and_both_serve(
    own_scheduler: Scheduler, start_worker: StartWorker, mounts: Path, fresh: Fresh
) -> None:
    directory = fresh("xfs")
    make_guest(directory / "a")
    # `-n celery@%h` is what Celery itself would name a worker that was given no name.
    workers = [start_worker(mounts, 1, command="celery", args=["-n", "celery@%h"], wait=False) for _ in range(2)]
    for worker in workers:
        worker.wait_until_ready()

    scheduler = own_scheduler
    names: set[str] = set()

    def both_answer() -> bool:  # a worker that says it is ready listens for this some moments later
        names.update(name for answer in scheduler.app.control.ping(timeout=1) or [] for name in answer)
        return len(names) == 2

    wait_until(both_answer, "two names")
    assert all(any(name in worker.output() for name in names) for worker in workers)
    numbers = itertools.count()

    def both_serve() -> bool:  # one may be fast enough to make many forks before the other has one
        paths = [{"source": str(directory / "a"), "destination": f"{directory}/b-{next(numbers)}"} for _ in range(5)]
        sent = [scheduler.send(request) for request in paths]
        assert all(scheduler.wait(one)["status"] == "succeeded" for one in sent)
        return all("Task forkvm.fork" in worker.output() for worker in workers)

    wait_until(both_serve, "a fork from each")
    scheduler.wait_quiet()


def test_a_worker_names_the_commands_that_its_user_may_not_use(
    own_scheduler: Scheduler, start_worker: StartWorker, mounts: Path
) -> None:
    own_scheduler.redis.acl_setuser(
        "forkvm", enabled=True, passwords=["+pass"], keys=["*"], channels=["*"], commands=["+@all", "-evalsha"]
    )
    url = f"redis+socket://forkvm:pass@{own_scheduler.redis.connection_pool.connection_kwargs['path']}"

    worker = start_worker(mounts, 1, env={"FORKVM_BROKER_URL": url, "FORKVM_RESULT_BACKEND": url}, wait=False)

    worker.wait_for_output("rights: its user may not use: EVALSHA; give it the rights that SECURITY.md lists")


def test_worker_nodes_have_the_configured_name_and_a_suffix_if_two_have_the_same(
    own_scheduler: Scheduler, start_worker: StartWorker, mounts: Path
) -> None:
    host = socket.gethostname()
    name = f"rack-{uuid.uuid4().hex[:8]}"
    for _ in range(2):
        start_worker(mounts, 1, command="forkvm", env={"FORKVM_NAME": name})
    names: set[str] = set()

    def both_answer() -> bool:
        names.update(name for answer in own_scheduler.app.control.ping(timeout=1) or [] for name in answer)
        return len(names) == 2

    wait_until(both_answer, "two names")
    assert f"{name}@{host}" in names
    assert all(node.startswith(name) and node.endswith(f"@{host}") for node in names)


def test_worker_without_roots_does_not_start_and_prints_one_line(redis_server: RedisServer) -> None:
    done = _run_to_the_end(redis_server, ())

    assert done.returncode not in (0, None)
    assert "FORKVM_ROOTS" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("forkvm: ")] == [done.stderr.splitlines()[-1]]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("FORKVM_CHUNK_BYTES", "much"),
        ("FORKVM_CHUNK_BYTES", "0"),
        ("FORKVM_RESULT_EXPIRES", "-1"),
        ("FORKVM_DOMAIN", "a b"),
        ("FORKVM_ROOTS", "guests"),
    ],
)
def test_worker_with_an_invalid_setting_does_not_start_and_names_it(
    redis_server: RedisServer, mounts: Path, name: str, value: str
) -> None:
    done = _run_to_the_end(redis_server, mounts, **{name: value})

    assert done.returncode not in (0, None)
    assert name in done.stderr.splitlines()[-1]
    assert done.stderr.splitlines()[-1].startswith("forkvm: ")
    assert "Traceback" not in done.stdout + done.stderr


class _Exploit:
    """Would make a file, were it ever unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path(self._path),)


def _message(body: bytes, content_type: str) -> bytes:
    fork_id = str(uuid.uuid4())
    return json.dumps(
        {
            "body": base64.b64encode(body).decode(),
            "content-encoding": "binary" if "json" not in content_type else "utf-8",
            "content-type": content_type,
            "headers": {"lang": "py", "task": "forkvm.fork", "id": fork_id, "root_id": fork_id, "parent_id": None},
            "properties": {
                "correlation_id": fork_id,
                "delivery_mode": 2,
                "delivery_info": {"exchange": "", "routing_key": QUEUE},
                "priority": 0,
                "body_encoding": "base64",
                "delivery_tag": str(uuid.uuid4()),
            },
        }
    ).encode()


def test_message_that_is_no_json_of_a_task_is_refused_and_the_worker_serves_the_next_job(
    start_system: StartSystem, fresh: Fresh
) -> None:
    # Given
    system = start_system(concurrency=1)
    directory = fresh("xfs")
    make_guest(directory / "a")
    exploit_file = directory / "trap"
    messages = {
        "pickle": (pickle.dumps(([], {"request": _Exploit(exploit_file)}, {})), "application/x-python-serialize"),
        "yaml": (b"- !!python/object/apply:os.system [true]", "application/x-yaml"),
        "another content type": (b"[[], {}, {}]", "text/plain"),
        "half a document": (b"[[], {", "application/json"),
        "a list of the wrong length": (b"[1, 2]", "application/json"),
        "a text": (b'"no task"', "application/json"),
        "raw bytes": (b"\xff\xfe", "application/data"),
    }
    for name, (body, content_type) in messages.items():
        # When
        refused = system.worker.output().count(_REFUSED)
        system.scheduler.redis.lpush(QUEUE, _message(body, content_type))

        # Then
        request = {"source": str(directory / "a"), "destination": str(directory / name)}
        sent = system.scheduler.send(request)
        wait_until(lambda sent=sent: sent.ready() or not system.worker.running, f"the fork after {name}")  # type: ignore[misc]
        assert system.worker.running, f"{name} ended the worker:\n{system.worker.output()[-500:]}"
        assert sent.state == "SUCCESS"
        assert not exploit_file.exists()
        # The process that made the fork may have taken both messages, and returned this one to its worker.
        system.worker.wait_for_output(_REFUSED, refused + 1)
    system.assert_left_nothing_in(directory)


def test_message_for_an_unknown_task_is_dropped_with_a_line_in_the_log(
    system: System, scheduler: Scheduler, fresh: Fresh
) -> None:
    directory = fresh("xfs")
    make_guest(directory / "a")

    scheduler.app.send_task("forkvm.nothing", queue=QUEUE, task_id="nothing")

    assert scheduler.fork(directory / "a", directory / "b")["status"] == "succeeded"
    wait_until(lambda: "forkvm.nothing" in system.worker.output(), "a line in the log")
    system.assert_left_nothing_in(directory)


def test_worker_of_a_domain_serves_only_its_queue(
    own_scheduler: Scheduler, start_worker: StartWorker, mounts: Path, fresh: Fresh
) -> None:
    directory = fresh("xfs")
    source = directory / "a"
    source.mkdir()
    for n in range(60):
        (source / str(n)).mkdir()
        (source / str(n) / "state").write_text("paused")
    start_worker(
        mounts, command="celery", queue="forkvm.rack-7", env={"FORKVM_INLINE_FILES": "10", "FORKVM_CHUNK_FILES": "10"}
    )
    scheduler = own_scheduler
    request = {"source": str(source), "destination": str(directory / "b")}

    other = scheduler.send(request | {"destination": str(directory / "c")}, "elsewhere")
    sent = scheduler.app.send_task("forkvm.fork", kwargs={"request": request}, queue="forkvm.rack-7", task_id="here")

    result = scheduler.wait(sent)
    assert result["chunks"] > 1
    assert not other.ready()
    assert scheduler.messages()[QUEUE] == 1
    scheduler.redis.delete(QUEUE)


def test_a_collection_of_garbage_in_a_pool_process_leaves_out_the_program(
    own_scheduler: Scheduler, start_worker: StartWorker, mounts: Path
) -> None:
    """It would stop the process for 60 to 140 ms, in the middle of a fork."""
    worker = start_worker(mounts, command="celery", args=["-I", "tests.support.system.frozen_objects"])

    worker.wait_for_output("frozen objects: ", times=2)

    assert min(map(int, re.findall(r"frozen objects: (\d+)", worker.output()))) > 50_000
