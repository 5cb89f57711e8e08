"""Kills workers of both versions at random, and starts them again."""

from __future__ import annotations

import random
import re
import signal
import time
from collections import Counter, defaultdict

from tests.fixtures.processes import Worker
from tests.support.system.systems import send
from tests.upgrade.conftest import StartVersion, Version

#: A line of a worker's log. A task of a fork or campaign has an id that begins with the job's.
_TAKEN = re.compile(r"Task forkvm\.\w+\[(job-\d+)?\S*\] received")
#: Seconds in which a worker must end after SIGTERM: no task of a test takes longer.
_GRACE_SECONDS = 20.0


class Workers:
    """One worker of each version, and the number of each fault."""

    def __init__(self, start: StartVersion, order: random.Random) -> None:
        self._start = start
        self._order = order
        self._started: dict[Version, list[Worker]] = {"earlier": [start("earlier")], "this": [start("this")]}
        self.faults: Counter[str] = Counter()

    def kill_until(self, end: float) -> None:
        """Kill and restart until `time.monotonic()` is `end`; both workers run when it returns."""
        while time.monotonic() < end:
            version = self._order.choice(list(self._started))
            fault = self._order.choice([self._kill_worker, self._kill_worker, self._kill_child, self._end_worker])
            fault(version)
            self.faults[f"{fault.__name__.strip('_').replace('_', ' ')} ({version})"] += 1
            time.sleep(self._order.uniform(0.2, 2.0))

    def jobs_taken(self) -> dict[Version, Counter[str]]:
        """How many tasks of each job the workers of each version took."""
        taken: dict[Version, Counter[str]] = defaultdict(Counter)
        for version, workers in self._started.items():
            for worker in workers:
                taken[version].update(job for job in _TAKEN.findall(worker.output()) if job)
        return taken

    def all_run(self) -> bool:
        """Whether the last worker of each version still runs."""
        return all(workers[-1].running for workers in self._started.values())

    def _kill_worker(self, version: Version) -> None:
        self._started[version][-1].kill()
        self._started[version].append(self._start(version))

    def _kill_child(self, version: Version) -> None:
        children = self._started[version][-1].children
        send(children and [self._order.choice(children)], signal.SIGKILL)

    def _end_worker(self, version: Version) -> None:
        worker = self._started[version][-1]
        worker.term()
        worker.wait(_GRACE_SECONDS)
        self._started[version].append(self._start(version))
