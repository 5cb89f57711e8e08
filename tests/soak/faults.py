"""Faults of processes, Redis and connections.

A fault is over, and ended processes are started again, when it returns.
"""

from __future__ import annotations

import random
import re
import signal
import time
from collections import Counter
from collections.abc import Callable

from tests.fixtures.processes import Worker
from tests.soak.damage import Damage
from tests.soak.other_application import Interval
from tests.soak.redis_faults import RedisFaults
from tests.support.system.systems import send

#: Starts the worker of this number.
Start = Callable[[int], Worker]

#: A line of a worker's log.
_TAKEN = re.compile(r"Task forkvm\.(?!sweep)\w+\[.*\] received")
#: Seconds in which a worker must end after SIGTERM: no task takes that long.
_GRACE_SECONDS = 15.0


class Faults:
    """Injects faults into workers and Redis, and counts them."""

    def __init__(self, start: Start, redis: RedisFaults, damage: Damage, rng: random.Random) -> None:
        self._start_one = start
        self._redis = redis
        self._damage = damage
        self._rng = rng
        #: All workers that were ever started; `workers` are the running ones.
        self.started: list[Worker] = []
        self.workers = [self._start(number) for number in range(2)]
        self.counts: Counter[str] = Counter()
        #: When a fault hit Redis itself.
        self.of_redis: list[Interval] = []

    def inject(self) -> None:
        """Inject one random fault of a process, of Redis or of a connection."""
        fault = self._rng.choice(
            [
                *(self._kill_child,) * 3,
                self._stop_child,
                self._stop_worker,
                self._kill_worker,
                self._end_worker,
                *(self._rng.choice(self._redis.of_server),) * 4,
                *(self._rng.choice(self._redis.of_connections),) * 2,
            ]
        )
        began = time.time()
        fault()
        self.counts[fault.__name__.strip("_").replace("_", " ")] += 1
        if fault in self._redis.of_server:
            self.of_redis.append((began, time.time()))

    def damage(self) -> None:
        """Damage the staging of one random job."""
        self.counts[self._damage.inject()] += 1

    def deliveries(self) -> int:
        """The total number of messages of forks and campaigns that the workers took."""
        return sum(len(_TAKEN.findall(worker.output())) for worker in self.started)

    def _start(self, number: int) -> Worker:
        worker = self._start_one(number)
        self.started.append(worker)
        return worker

    def _worker(self) -> int:
        return self._rng.randrange(len(self.workers))

    def _child(self) -> list[int]:
        children = self.workers[self._worker()].children
        return [self._rng.choice(children)] if children else []

    def _kill_child(self) -> None:
        send(self._child(), signal.SIGKILL)

    def _stop_child(self) -> None:
        child = self._child()
        send(child, signal.SIGSTOP)
        time.sleep(self._rng.uniform(0.5, 14.0))
        send(child, signal.SIGCONT)

    def _stop_worker(self) -> None:
        worker = self.workers[self._worker()]
        everyone = [worker.pid, *worker.children]
        send(everyone, signal.SIGSTOP)
        time.sleep(self._rng.uniform(0.5, 14.0))
        send(everyone, signal.SIGCONT)

    def _kill_worker(self) -> None:
        number = self._worker()
        self.workers[number].kill()
        self.workers[number] = self._start(number)

    def _end_worker(self) -> None:
        number = self._worker()
        self.workers[number].term()
        self.workers[number].wait(_GRACE_SECONDS)
        self.workers[number] = self._start(number)
