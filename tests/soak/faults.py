"""What strikes while forks are made: each fault is over, and all that was ended is started again, when it returns."""

from __future__ import annotations

import random
import re
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress

from redis.exceptions import RedisError

from tests.fixtures.processes import Worker
from tests.fixtures.redis_server import RedisServer
from tests.system.running import send
from tests.system.scheduler import QUEUES

Start = Callable[[], Worker]

#: A line of a worker's log.
_TAKEN = re.compile(r"Task forkvm\.(?:fork|chunk|finish|bury|campaign|batch|conclude)\[.*\] received")
#: Seconds in which a worker that is told to end has ended: none of its tasks takes that long.
_GRACE_SECONDS = 15.0


class Faults:
    """Strikes workers and Redis; counts what it did."""

    def __init__(self, server: RedisServer, start: Start, dice: random.Random) -> None:
        self._server = server
        self._start_one = start
        self._dice = dice
        #: All that were ever started; the workers are the living ones.
        self.started: list[Worker] = []
        self.workers = [self._start(), self._start()]
        self.counts: Counter[str] = Counter()

    def strike(self) -> None:
        """One fault, by chance."""
        fault = self._dice.choice(
            [
                self._kill_child,
                self._kill_child,
                self._kill_child,
                self._stop_child,
                self._stop_worker,
                self._kill_worker,
                self._end_worker,
                self._kill_redis,
                self._restart_redis,
                self._cut_connections,
                self._deliver_again,
            ]
        )
        self.counts[fault.__name__.strip("_").replace("_", " ")] += 1
        fault()

    def deliveries(self) -> int:
        """How many messages of forks and campaigns the workers took, in all."""
        return sum(len(_TAKEN.findall(worker.output())) for worker in self.started)

    def _start(self) -> Worker:
        worker = self._start_one()
        self.started.append(worker)
        return worker

    def _worker(self) -> int:
        return self._dice.randrange(len(self.workers))

    def _child(self) -> list[int]:
        children = self.workers[self._worker()].children
        return [self._dice.choice(children)] if children else []

    def _kill_child(self) -> None:
        send(self._child(), signal.SIGKILL)

    def _stop_child(self) -> None:
        child = self._child()
        send(child, signal.SIGSTOP)
        time.sleep(self._dice.uniform(0.5, 14.0))
        send(child, signal.SIGCONT)

    def _stop_worker(self) -> None:
        worker = self.workers[self._worker()]
        everyone = [worker.pid, *worker.children]
        send(everyone, signal.SIGSTOP)
        time.sleep(self._dice.uniform(0.5, 14.0))
        send(everyone, signal.SIGCONT)

    def _kill_worker(self) -> None:
        number = self._worker()
        self.workers[number].kill()
        self.workers[number] = self._start()

    def _end_worker(self) -> None:
        number = self._worker()
        self.workers[number].term()
        self.workers[number].wait(_GRACE_SECONDS)
        self.workers[number] = self._start()

    def _kill_redis(self) -> None:
        self._server.kill()
        time.sleep(self._dice.uniform(0.0, 2.0))
        self._server.start()

    def _restart_redis(self) -> None:
        self._server.stop()
        time.sleep(self._dice.uniform(0.0, 4.0))
        self._server.start()

    def _cut_connections(self) -> None:
        with self._server.client() as client, suppress(RedisError):
            client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")

    def _deliver_again(self) -> None:
        """Messages that wait are put into their queue once more, in the other order."""
        with self._server.client(decode_responses=False) as client, suppress(RedisError):
            for queue in QUEUES:
                for message in client.lrange(queue, 0, 9):
                    client.rpush(queue, message)
