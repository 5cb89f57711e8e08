"""The values that are read, not counted: queues, roots, and the pool."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from threading import Lock
from typing import Any

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tasks.copier.staging.gc import count_stagings
from tasks.store.queues import unacked_messages, waiting_messages
from worker.observability.consumer import Consumer
from worker.observability.readings import Reading

#: Most directories in which staging is counted, for each root.
_MOST_PARENTS = 1000


@dataclass(frozen=True)
class RedisValues:
    """What Redis says about the queues that this worker consumes."""

    version: str
    waiting: dict[str, int]
    unacked: dict[str, int]


class RedisReader:
    """Reads them, over a connection of its own that is opened again after an error."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._connection: Any = None

    def __call__(self) -> RedisValues:
        """Read them. Raises the errors of kombu and redis-py."""
        try:
            if self._connection is None:
                self._connection = self._app.connection_for_read()
                self._channel = self._connection.channel()
            client, queues = self._channel.client, sorted(self._app.amqp.queues.consume_from)
            server = client.info("server")
            unacked = unacked_messages(client, self._channel.unacked_key, queues)
            return RedisValues(str(server["redis_version"]), waiting_messages(client, queues), unacked)
        except BaseException:
            connection, self._connection = self._connection, None
            with suppress(Exception):  # it is broken
                connection.release()
            raise


@dataclass(frozen=True)
class RootValues:
    """What a root's filesystem says. `free_inodes` is None where inodes are not limited (btrfs)."""

    is_writable: bool
    free_bytes: int
    free_inodes: int | None
    stagings: int


class RootReader:
    """Reads them for one root.

    A search of the whole root for staging directories would take long. They lie beside the destinations of forks, so
    they are counted in the directories that forks of this worker were made in.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self._parents = OrderedDict.fromkeys([root])
        self._lock = Lock()

    def add(self, parent: str) -> None:
        """Count the staging directories of `parent` too, if it is below this root."""
        if os.path.commonpath([self.root, parent]) == self.root:
            with self._lock:
                self._parents[parent] = None
                self._parents.move_to_end(parent)
                if len(self._parents) > _MOST_PARENTS:
                    self._parents.popitem(last=False)

    def __call__(self) -> RootValues:
        """Read them. Raises OSError if the root cannot be read."""
        status = os.statvfs(self.root)
        with self._lock:
            parents = list(self._parents)
        return RootValues(
            is_writable=os.access(self.root, os.W_OK | os.X_OK, effective_ids=True),
            free_bytes=status.f_bavail * status.f_frsize,
            free_inodes=status.f_favail if status.f_files else None,
            stagings=sum(map(_stagings_in, parents)),
        )


def _stagings_in(parent: str) -> int:
    try:
        fd = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:  # removed meanwhile
        return 0
    try:
        return count_stagings(fd)
    except OSError:
        return 0
    finally:
        os.close(fd)


@dataclass(eq=False)
class Gauges(Collector):
    """The gauges, from the last readings. A value that could not be read is left out."""

    consumer: Consumer
    redis: Reading[RedisValues]
    roots: dict[str, Reading[RootValues]]
    #: The last version that Redis gave: a label that changes with each outage would make new series.
    _redis_version: str = ""

    def collect(self) -> Iterator[Metric]:
        """Yield all gauges."""
        pool = self.consumer
        yield _single("forks_in_progress", "Forks and campaigns that this worker's children work on.", pool.jobs)
        yield _single("children", "Pool processes of this worker.", pool.children)
        yield _single("children_busy", "Pool processes of this worker that run a task.", pool.children_busy)
        redis = self.redis.value()
        found = RedisValues("", {}, {}) if redis is None else redis
        yield _family("queue_messages", "Messages that wait in a queue.", "queue", found.waiting.items())
        unacked = "Messages of a queue that a worker has taken and not finished."
        yield _family("unacked_messages", unacked, "queue", found.unacked.items())
        yield from self._of_roots()
        self._redis_version = found.version or self._redis_version
        yield _build_info(self._redis_version)

    def _of_roots(self) -> Iterator[Metric]:
        values = [(root, value) for root, reading in self.roots.items() if (value := reading.value()) is not None]
        free = "Bytes that the worker's user may still write below a root."
        yield _family("root_free_bytes", free, "root", ((root, value.free_bytes) for root, value in values))
        limited = [(root, value.free_inodes) for root, value in values if value.free_inodes is not None]
        yield _family("root_free_inodes", "Inodes that may still be made below a root.", "root", limited)
        text = "Staging directories in the directories that forks of this worker were made in."
        yield _family("staging_directories", text, "root", ((root, value.stagings) for root, value in values))


def _single(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"forkvm_{name}", text, value=value)


def _family(name: str, text: str, label: str, values: Iterable[tuple[str, float]]) -> Metric:
    family = GaugeMetricFamily(f"forkvm_{name}", text, labels=[label])
    for key, value in values:
        family.add_metric([key.encode("utf-8", "backslashreplace").decode()], value)
    return family


def _build_info(redis_server: str) -> Metric:
    family = GaugeMetricFamily(
        "forkvm_build_info",
        "1, with the versions of this program, of Celery, and of the Redis server.",
        labels=["version", "celery", "redis_server"],
    )
    family.add_metric([version("forkvm"), version("celery"), redis_server], 1)
    return family
