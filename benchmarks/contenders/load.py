"""A load of single forks at a fixed rate, on forkvm or on the ten-line worker, and when each result is in Redis."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from redis import Redis

from benchmarks.contenders.programs import ContenderFailed
from benchmarks.contenders.service import Service
from tasks.names import FORK_TASK

_PROJECT = Path(__file__).resolve().parents[2]
_STATES = "celery-task-meta-"
#: How long the ten-line worker may take to start, and the last result to come, in seconds.
_READY_SECONDS = 30.0
_LAST_SECONDS = 120.0


@dataclass(frozen=True)
class Target:
    """A worker that takes requests for forks."""

    name: str
    task: str
    queue: str
    pid: int


@dataclass(frozen=True)
class Load:
    """What one load did."""

    #: Seconds from just before `send_task` until the result was in Redis, for each request in the order of sending.
    latencies: list[float]
    #: Seconds from the first request to the last result.
    seconds: float

    def percentile(self, percent: int) -> float:
        """The latency in seconds that so many percent of the forks do not exceed."""
        ordered = sorted(self.latencies)
        return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]


def forkvm(service: Service) -> Target:
    """The worker of the service."""
    return Target("forkvm", FORK_TASK, "forkvm", service.worker_pid)


@contextmanager
def ten_line_worker(service: Service) -> Iterator[Target]:
    """A worker of `benchmarks.contenders.ten_line_worker` with two processes, on the Redis of the service."""
    environment = os.environ | {"TEN_LINES_URL": str(service.client.conf.broker_url)}
    command = [sys.executable, "-m", "celery", "-A", "benchmarks.contenders.ten_line_worker", "worker"]
    with tempfile.TemporaryFile() as log:
        worker = subprocess.Popen(
            [*command, "--concurrency", "2", "--loglevel", "INFO", "-Q", "ten_lines", "-n", "ten_lines@%h"],
            cwd=_PROJECT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
        try:
            deadline = time.monotonic() + _READY_SECONDS
            while b" ready." not in os.pread(log.fileno(), 1 << 20, 0):
                if worker.poll() is not None or time.monotonic() > deadline:
                    raise ContenderFailed("the ten-line worker did not start")
                time.sleep(0.05)
            yield Target("ten lines", "ten_lines.fork", "ten_lines", worker.pid)
        finally:
            worker.terminate()
            worker.wait()


def run_load(service: Service, target: Target, requests: Sequence[dict[str, str]], rate: float | None) -> Load:
    """Send requests, so many a second or (None) all at once, and wait for all results. Raises ContenderFailed."""
    ours, theirs = multiprocessing.Pipe()
    socket = str(service.redis.connection_pool.connection_kwargs["path"])
    collector = multiprocessing.Process(target=_collect, args=(socket, len(requests), theirs), daemon=True)
    collector.start()
    try:
        ours.recv()
        sent: dict[str, float] = {}
        began = time.monotonic()
        for number, request in enumerate(requests):
            if rate is not None:
                time.sleep(max(0.0, began + number / rate - time.monotonic()))
            fork_id = f"load-{uuid.uuid4().hex}"
            sent[fork_id] = time.monotonic()
            service.client.send_task(target.task, kwargs={"request": request}, task_id=fork_id, queue=target.queue)
        if not ours.poll(_LAST_SECONDS):
            raise ContenderFailed(f"{target.name}: not all results came within {_LAST_SECONDS:g} s")
        ended: dict[str, tuple[float, bool]] = ours.recv()
    finally:
        collector.kill()
        collector.join()
    failed = [fork_id for fork_id in sent if not ended[fork_id][1]]
    if failed:
        raise ContenderFailed(f"{target.name}: {len(failed)} of {len(sent)} forks failed")
    times = [ended[fork_id][0] for fork_id in sent]
    return Load([end - start for end, start in zip(times, sent.values(), strict=True)], max(times) - began)


def _collect(socket: str, count: int, parent: Connection) -> None:
    """Send `parent` one message when this process listens, and then when each of `count` jobs ended, and how."""
    ended: dict[str, tuple[float, bool]] = {}
    with Redis(unix_socket_path=socket) as redis, redis.pubsub(ignore_subscribe_messages=True) as channel:
        channel.psubscribe(f"{_STATES}load-*")
        channel.get_message(timeout=5)
        parent.send("listening")
        while len(ended) < count:
            message = channel.get_message(timeout=5)
            if message is not None:
                now, record = time.monotonic(), message["data"][:40]
                if b'"SUCCESS"' in record or b'"FAILURE"' in record:
                    ended.setdefault(message["channel"].decode()[len(_STATES) :], (now, b'"SUCCESS"' in record))
    parent.send(ended)
