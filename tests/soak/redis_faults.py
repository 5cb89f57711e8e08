"""Faults of Redis, and of the connections to it."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from redis import Redis
from redis.exceptions import RedisError

from tests.fixtures.processes import wait_until
from tests.fixtures.redis_server import RedisServer
from tests.soak import plan
from tests.support.system.redis_proxy import Proxy
from tests.support.system.scheduler import QUEUES

#: The longest time for which connections are silent, in seconds: at most 45, and at most a sixth of the soak.
_LONGEST_SILENCE = min(45.0, plan.seconds() / 6)
#: Milliseconds after which Redis answers BUSY while a script runs.
_BUSY_MILLISECONDS, _DEFAULT_BUSY_MILLISECONDS = 50, 5000


class RedisFaults:
    """Faults of Redis, each over when the method returns. Faults of connections affect one worker, behind `proxy`."""

    def __init__(self, server: RedisServer, proxy: Proxy, rng: random.Random) -> None:
        self._server = server
        self._proxy = proxy
        self._rng = rng
        #: Faults of Redis itself: other applications see them too.
        self.of_server: list[Callable[[], None]] = [
            self.kill_redis,
            self.restart_redis,
            self.cut_connections,
            self.readonly,
            self.too_few_replicas,
            self.misconf,
            self.busy,
        ]
        self.of_connections: list[Callable[[], None]] = [
            self.silence_and_cut_connections,
            self.hold_connections,
            self.deliver_again,
        ]

    # -- the server

    def kill_redis(self) -> None:
        """Kill Redis after it has written everything that it acknowledged.

        With appendfsync everysec it delays writes for up to 2 s while a disk sync runs (redis.conf, `appendfsync`): a
        job that failed in that time would be done again, with another result.
        """
        with self._server.client() as client, suppress(RedisError):
            client.config_set("appendfsync", "always")
            client.ping()  # answered after the writes of earlier rounds of its event loop
        self._server.kill()
        time.sleep(self._rng.uniform(0.0, 2.0))
        self._server.start()

    def restart_redis(self) -> None:
        self._server.stop()
        time.sleep(self._rng.uniform(0.0, 4.0))
        self._server.start()

    def cut_connections(self) -> None:
        with self._server.client() as client, suppress(RedisError):
            client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")

    def readonly(self) -> None:
        """The server is a replica for a while, as in a failover."""
        seconds = self._rng.uniform(1.0, 4.0)
        with self._asking() as client:
            client.replicaof("127.0.0.1", "1")
            time.sleep(seconds)
            client.replicaof("NO", "ONE")

    def too_few_replicas(self) -> None:
        """Writes are refused with NOREPLICAS."""
        seconds = self._rng.uniform(1.0, 4.0)
        with self._asking() as client:
            client.config_set("min-replicas-to-write", 1)
            time.sleep(seconds)
            client.config_set("min-replicas-to-write", 0)

    def misconf(self) -> None:
        """Writes are refused because the last save failed: the process that saves is killed."""
        seconds = self._rng.uniform(0.5, 2.0)
        with self._asking() as client:
            client.config_set("save", "3600 1")
            client.config_set("rdb-key-save-delay", 10_000_000)  # microseconds
            try:
                with suppress(RedisError):  # its append-only file is currently being rewritten
                    client.bgsave()
                    _kill_children(self._server.pid)
                    wait_until(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err", "a failed save")
                    time.sleep(seconds)
            finally:
                client.config_set("rdb-key-save-delay", 0)
                client.config_set("save", "")

    def busy(self) -> None:
        """A script runs; all other clients get BUSY."""
        seconds = self._rng.uniform(0.5, 1.5)
        with self._asking() as client, self._server.client() as other:
            client.config_set("busy-reply-threshold", _BUSY_MILLISECONDS)
            spinning = threading.Thread(target=_spin, args=(other,))
            spinning.start()
            time.sleep(seconds)
            client.script_kill()
            spinning.join()
            client.config_set("busy-reply-threshold", _DEFAULT_BUSY_MILLISECONDS)

    # -- connections and their messages

    def silence_and_cut_connections(self) -> None:
        """Connections pass nothing on and are not closed until much later."""
        self._proxy.silence()
        time.sleep(self._rng.uniform(1.0, _LONGEST_SILENCE))
        self._proxy.cut()

    def hold_connections(self) -> None:
        """Bytes on all connections, also new ones, arrive much later."""
        self._proxy.hold()
        time.sleep(self._rng.uniform(1.0, _LONGEST_SILENCE))
        self._proxy.release()

    def deliver_again(self) -> None:
        """Put waiting messages into their queue a second time, in reverse order."""
        with self._server.client(decode_responses=False) as client, suppress(RedisError):
            for queue in QUEUES:
                for message in client.lrange(queue, 0, 9):
                    client.rpush(queue, message)

    @contextmanager
    def _asking(self) -> Iterator[Redis]:
        with self._server.client() as client:
            client.ping()  # connected: a busy server accepts no new connection
            yield client


def _spin(client: Redis) -> None:
    with suppress(RedisError):  # the script is killed
        client.eval("while true do end", 0)


def _kill_children(pid: int) -> None:
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        with suppress(ProcessLookupError):
            os.kill(int(child), signal.SIGKILL)
