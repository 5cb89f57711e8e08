"""Another Celery application on the same Redis database, whose tasks wait for seconds: each must run once.

It has Celery's default settings, so faults of Redis itself may lose or repeat its tasks, which is not this program's
fault: only tasks that met no fault of Redis while they waited are checked.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from celery import Celery
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from tests.fixtures.processes import end_group, wait_until
from tests.fixtures.redis_server import RedisServer

#: The begin and the end of a fault, in seconds since the epoch.
Interval = tuple[float, float]

_SOURCE = """
import os, time
from celery import Celery
app = Celery("other", broker=os.environ["URL"])
@app.task(name="other.note")
def note(number):
    with open(os.environ["NOTES"], "a") as notes:
        notes.write(f"{number} {time.time()}\\n")
"""
_QUEUE = "other"
#: kombu's default keys.
_KEYS = (_QUEUE, "unacked", "unacked_index", "unacked_mutex")
#: How long a task waits: longer than the visibility timeout of the soak's workers. And the interval between tasks.
_SHORTEST_WAIT, _LONGEST_WAIT = 6.0, 9.0
_EVERY_SECONDS = 0.7
#: The time after a task ran in which a fault of Redis may still lose its acknowledgement.
_ACKNOWLEDGED_SECONDS = 3.0
#: Seconds for the last tasks to run.
_TIMEOUT = 60.0


class OtherApplication:
    """Its worker, its client, and the checks of its tasks."""

    def __init__(self, directory: Path, server: RedisServer, rng: random.Random) -> None:
        self._directory = directory
        self._server = server
        self._rng = rng
        self._notes, self.log = directory / "notes", directory / "other.log"
        self._client = Celery("other-client", broker=server.broker_url, set_as_current=False)
        self._sent: dict[int, float] = {}
        self._next = 0.0
        self._process: subprocess.Popen[bytes] | None = None

    def resume(self) -> None:
        """Start the worker if it has ended, and send a task if it is time for one."""
        if self._process is None or self._process.poll() is not None:
            self._start()
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _EVERY_SECONDS
        number, wait = len(self._sent), self._rng.uniform(_SHORTEST_WAIT, _LONGEST_WAIT)
        with suppress(OperationalError, RedisError, OSError):  # it is unknown whether the task was sent
            self._client.send_task("other.note", args=[number], queue=_QUEUE, countdown=wait, retry=False)
            self._sent[number] = time.time()

    def check(self, faults: list[Interval]) -> str:
        """Wait for the tasks that met no fault of Redis, check that each ran once, and return a summary line."""
        wait_until(
            lambda: not self._missing(faults), f"tasks of the other application: {self._missing(faults)}", _TIMEOUT
        )
        runs = self._runs()
        checked = {n: times for n, times in runs.items() if n in self._sent and not self._overlaps(n, times[0], faults)}
        several = {n: times for n, times in checked.items() if len(times) > 1}
        assert several == {}, f"tasks of the other application ran more than once: {several}"
        others = sum(len(times) for n, times in runs.items() if n not in checked)
        return (
            f"{len(self._sent)} tasks of another application: {len(checked)} met no fault of Redis, and ran once; "
            f"{len(self._sent) - len(checked)} others ran {others} times"
        )

    def end(self) -> None:
        """Stop the worker, and remove the application's keys from Redis."""
        if self._process is not None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(20)
            end_group(self._process)
        self._client.close()
        if self._server.running:
            with self._server.client() as client:
                client.delete(*_KEYS)

    def _start(self) -> None:
        (self._directory / "other.py").write_text(_SOURCE)
        self._notes.touch()
        command = [sys.executable, "-m", "celery", "-A", "other", "worker", "-P", "solo", "-Q", _QUEUE, "-l", "INFO"]
        environment = os.environ | {
            "URL": self._server.broker_url,
            "NOTES": str(self._notes),
            "PYTHONPATH": str(self._directory),
        }
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command, cwd=self._directory, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def _runs(self) -> dict[int, list[float]]:
        """The times at which each task ran, by its number."""
        runs: dict[int, list[float]] = {}
        for line in self._notes.read_text().splitlines():
            number, moment = line.split()
            runs.setdefault(int(number), []).append(float(moment))
        return runs

    def _missing(self, faults: list[Interval]) -> list[int]:
        """The tasks that have not run, although no fault hit Redis since they were sent."""
        runs = self._runs()
        return [n for n in self._sent if n not in runs and not self._overlaps(n, time.time(), faults)]

    def _overlaps(self, number: int, until: float, faults: list[Interval]) -> bool:
        sent = self._sent[number]
        return any(began < until + _ACKNOWLEDGED_SECONDS and ended > sent for began, ended in faults)


@contextmanager
def other_application(directory: Path, server: RedisServer, rng: random.Random) -> Iterator[OtherApplication]:
    """Another application. At the end its worker is stopped and its keys are removed."""
    directory.mkdir()
    application = OtherApplication(directory, server, rng)
    try:
        yield application
    finally:
        application.end()
