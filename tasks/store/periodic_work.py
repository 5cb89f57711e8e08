"""Work that one worker of a queue does at a time, at an interval: sweeps, and searches for abandoned staging."""

from __future__ import annotations

from dataclasses import dataclass

from tasks.store.connection import Connection
from tasks.store.keys import Key


@dataclass(frozen=True)
class PeriodicWork:
    """The periodic work of all queues; `work` is `keys.SWEEP` or `keys.WALK`. Each method raises RedisError."""

    connection: Connection

    def start(self, work: Key, queue: str, seconds: int) -> bool:
        """Whether the work is due. If it is, the caller must do it: it is due again in so many seconds."""
        key = _key(work, queue)
        return bool(self.connection.ask(lambda: self.connection.redis.set(key, b"1", nx=True, ex=seconds)))

    def is_due(self, work: Key, queue: str) -> bool:
        """Whether the work is due. The caller does not take it."""
        return not self.connection.ask(lambda: self.connection.redis.exists(_key(work, queue)))

    def set_due(self, work: Key, queue: str, seconds: int) -> None:
        """Make the work due again in so many seconds."""
        key = _key(work, queue)
        self.connection.ask(lambda: self.connection.redis.expire(key, seconds))


def _key(work: Key, queue: str) -> str:
    return work.pattern.replace("{queue}", queue)
