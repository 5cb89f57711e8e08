"""The records of workers, by which one that hangs, was killed, or whose host is gone is still known."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple, cast

from tasks.copier.validation import Malformed, any_text, boolean, integer, json_object, list_of, load, reading, seconds
from tasks.store.connection import Connection
from tasks.store.keys import WORKER_SECONDS, WORKERS

#: More queues than any worker serves.
_MOST_QUEUES = 10_000


@dataclass(frozen=True)
class WorkerRecord:
    """What a worker says about itself."""

    name: str
    version: str
    host: str
    #: The queues of the domains that it serves, without the inner ones.
    queues: list[str]
    #: The number of its pool processes.
    children: int
    #: Whether it was told to end, and finishes its running tasks. This is its last record.
    ending: bool = False


class Seen(NamedTuple):
    """The last record of a worker."""

    record: WorkerRecord
    #: How long ago the worker wrote it, in seconds.
    age: float


@dataclass(frozen=True)
class Workers:
    """The records of all workers, each under its worker's name. Each method raises RedisError, and waits for nothing.

    The times are those of Redis's clock, so the clocks of the workers' hosts do not matter.
    """

    connection: Connection

    def keep(self, record: WorkerRecord) -> None:
        """Write the record of a worker, which replaces an earlier one of that name.

        These are three commands. MULTI and EXEC would be two more, and an idle worker may send three a second.
        """
        data = vars(record) | {"seen_at": self.connection.now()}
        with self.connection.redis.pipeline(transaction=False) as pipe:
            pipe.hset(WORKERS.pattern, record.name, json.dumps(data))
            pipe.expire(WORKERS.pattern, WORKER_SECONDS)
            pipe.execute()

    def remove(self, *names: str) -> None:
        """Remove the records of workers."""
        if names:
            self.connection.redis.hdel(WORKERS.pattern, *names)

    def remove_old(self) -> list[str]:
        """Remove the records that `seen` does not return any more. Returns the names of their workers.

        A worker calls this when it starts. So there are no more records than there were workers in the hour before
        the last start, also if each has a new name.
        """
        old = [seen.record.name for seen in self._read() if seen.age > WORKER_SECONDS]
        self.remove(*old)
        return old

    def seen(self) -> dict[str, Seen]:
        """The last record of each worker that wrote one within the last `WORKER_SECONDS`, by name."""
        return {seen.record.name: seen for seen in self._read() if seen.age <= WORKER_SECONDS}

    def _read(self) -> list[Seen]:
        """All records that this version can read."""
        entries = cast("dict[bytes, bytes]", self.connection.redis.hgetall(WORKERS.pattern))
        now = self.connection.now() if entries else 0.0
        found = []
        for name, value in sorted(entries.items()):
            with suppress(Malformed), reading("the record of a worker"):
                found.append(_seen(name.decode(), value, now))
        return found


def _seen(name: str, value: bytes, now: float) -> Seen:
    """The record under a name. Everyone who may write to Redis can write one, so every field is checked."""
    data = json_object(load(value))
    record = WorkerRecord(
        name=name,
        version=any_text(data["version"]),
        host=any_text(data["host"]),
        queues=list_of(data["queues"], any_text, _MOST_QUEUES),
        children=integer(data["children"]),
        ending=boolean(data["ending"]),
    )
    return Seen(record, max(0.0, now - seconds(data["seen_at"])))
