"""Redis, a worker with two children, and a client that sends forks by task name."""

from __future__ import annotations

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

from benchmarks.contenders.programs import QUEUE, Contender, ContenderFailed, Run, last_lines
from tasks.names import FORK_TASK
from tasks.store import keys
from worker.started_processes import ended_at_exit, redis_executable

_PROJECT = Path(__file__).resolve().parents[2]
_QUEUE = "forkvm"
#: The name of Redis's socket in its directory.
_SOCKET = "redis.sock"
#: A task of the measured worker that does nothing.
EMPTY_TASK = "benchmarks.empty"
#: How long Redis and the worker may take to start, in seconds.
_READY_SECONDS = 30.0
#: How long one fork may take, in seconds.
_FORK_SECONDS = 1200.0
#: Small forks before anything is timed, so that both children and the client have their connections.
_WARM_FORKS = 4


class NoService(Exception):
    """Redis or the worker did not start. The message says why."""


@dataclass(frozen=True)
class Message:
    """One task to send."""

    task: str
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Service:
    """The running processes and their client."""

    client: Celery
    redis: Redis
    #: Holds the append-only file of Redis.
    redis_directory: Path
    worker_pid: int
    worker_log: Path

    def contender(self) -> Contender:
        """forkvm through Redis: from send_task until the client has the result."""
        return Contender(QUEUE, self.run)

    def run(self, source: Path, destination: Path) -> Run:
        """One fork. Raises ContenderFailed."""
        fork_id = f"bench-{uuid.uuid4().hex}"
        request = {"source": str(source), "destination": str(destination)}
        began = time.perf_counter()
        try:
            fork = self.client.send_task(FORK_TASK, kwargs={"request": request}, task_id=fork_id, queue=_QUEUE)
            result = fork.get(timeout=_FORK_SECONDS)
        except Exception as error:  # Celery raises an exception of the failed task's type
            raise ContenderFailed(f"through Redis: {error}; the worker's log ends with\n{self._log_end()}") from None
        ended = time.perf_counter()
        if result["status"] != "succeeded":
            raise ContenderFailed(f"through Redis: {result}")
        return Run(began, ended)

    def run_all(self, messages: Sequence[Message]) -> float:
        """Seconds to send all messages and receive all results. Raises ContenderFailed."""
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
        except Exception as error:  # Celery raises an exception of the failed task's type
            raise ContenderFailed(f"through Redis: {error}; the worker's log ends with\n{self._log_end()}") from None
        return time.perf_counter() - began

    def forget_results(self) -> None:
        """Delete the results of earlier forks, so that they do not slow down Redis.

        The keys of periodic work stay: without them it would be due at once.
        """
        kept = tuple(key.pattern.partition("{")[0].encode() for key in (keys.SWEEP, keys.WALK))
        for pattern in ("forkvm:*", "celery-task-meta-*"):
            for key in self.redis.scan_iter(pattern, count=1000):
                if not key.startswith(kept):
                    self.redis.unlink(key)

    def _log_end(self) -> str:
        return last_lines(self.worker_log.read_text(errors="replace"), 20)


@contextmanager
def running_service(root: Path) -> Iterator[Service]:
    """Redis with its append-only file on, and a worker for forks below `root`. Raises NoService."""
    executable = redis_executable()
    if executable is None:
        raise NoService("redis-server is not installed")
    private = Path(tempfile.mkdtemp(prefix="forkvm-bench-redis-"))
    try:
        with _redis(executable, private) as socket:
            url = f"redis+socket://{socket}"
            log = private / "worker.log"
            with (
                _worker(url, root, log, {}, lambda: b" ready." in log.read_bytes()) as worker,
                Redis(unix_socket_path=str(socket)) as redis,
            ):
                client = Celery(broker=url, backend=url, set_as_current=False)
                service = Service(client, redis, private, worker, log)
                try:
                    _warm_up(service, root)
                    yield service
                finally:
                    client.close()
    finally:
        shutil.rmtree(private, ignore_errors=True)


@contextmanager
def worker_beside(service: Service, root: Path, database: int, settings: dict[str, str]) -> Iterator[Service]:
    """Another worker with these settings, on another database of the same Redis. Raises NoService."""
    socket = service.redis_directory / _SOCKET
    url = f"redis+socket://{socket}?virtual_host={database}"
    log, heartbeat = (service.redis_directory / f"worker-{database}.{what}" for what in ("log", "heartbeat"))
    with (
        _worker(url, root, log, settings | {"FORKVM_HEARTBEAT_FILE": str(heartbeat)}, heartbeat.exists) as worker,
        Redis(unix_socket_path=str(socket), db=database) as redis,
    ):
        client = Celery(broker=url, backend=url, set_as_current=False)
        beside = Service(client, redis, service.redis_directory, worker, log)
        try:
            _warm_up(beside, root)
            yield beside
        finally:
            client.close()


def _warm_up(service: Service, root: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="warm-", dir=root) as directory:
        source = Path(directory) / "source"
        source.mkdir()
        (source / "file").write_bytes(b"warm")
        try:
            for number in range(_WARM_FORKS):
                service.run(source, Path(directory) / f"fork-{number}")
        except ContenderFailed as error:
            raise NoService(str(error)) from None


@contextmanager
def _redis(executable: str, private: Path) -> Iterator[Path]:
    socket = private / _SOCKET
    command = [
        executable,
        *("--port", "0", "--unixsocket", str(socket), "--dir", str(private)),
        *("--appendonly", "yes", "--maxmemory-policy", "noeviction", "--save", ""),
        # The measure of messages reads the whole file. Redis would rewrite it from 64 MiB on.
        *("--auto-aof-rewrite-percentage", "0"),
    ]
    with _process(command, {}, private / "redis.log") as server:
        _wait_for(server, socket.exists, private / "redis.log", "Redis")
        yield socket


@contextmanager
def _worker(url: str, root: Path, log: Path, settings: dict[str, str], is_ready: Callable[[], bool]) -> Iterator[int]:
    command = [sys.executable, "-m", "benchmarks.contenders.measured_worker", "worker", "--concurrency", "2"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FORKVM_")}
    environment |= {"FORKVM_BROKER_URL": url, "FORKVM_ROOTS": str(root)} | settings
    with _process(command, environment, log) as worker:
        _wait_for(worker, is_ready, log, "the worker")
        yield worker.pid


@contextmanager
def _process(command: list[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that the terminal's Ctrl-C does not reach; ended with the context."""
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
    with ended_at_exit(process):
        yield process


def _wait_for(process: subprocess.Popen[bytes], ready: Callable[[], bool], log: Path, what: str) -> None:
    deadline = time.monotonic() + _READY_SECONDS
    while not ready():
        if process.poll() is not None or time.monotonic() > deadline:
            raise NoService(f"{what} did not start: {log.read_text(errors='replace').strip()}")
        time.sleep(0.05)
