"""The connection to Redis that all parts of the store share."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from redis import Redis
from redis.exceptions import RedisError

from tasks.store.keys import open_ttl
from tasks.store.redis_errors import wait_out

T = TypeVar("T")


@dataclass(frozen=True)
class Connection:
    """One Redis, and how long this program keeps its keys there."""

    redis: Redis
    #: TTL of the keys of a job from its end, in seconds: `FORKVM_RESULT_EXPIRES`.
    expires: int
    #: Celery's key for the state of a task.
    state_key: Callable[[str], str]
    #: Whether to wait while Redis is away. A worker waits: it must not lose a fork for that.
    patient: bool = False

    @property
    def open_expires(self) -> int:
        """The TTL of the keys of a job that has not ended, in seconds."""
        return open_ttl(self.expires)

    def ask(self, call: Callable[[], T], *also: type[RedisError]) -> T:
        """Ask Redis.

        A patient connection asks again while Redis is away, refuses writes, or answers with one of `also`.
        Raises RedisError.
        """
        return wait_out(call, *also) if self.patient else call()

    def read(self, key: str) -> Any:
        """The JSON value under a key, or None."""
        return self.read_all([key])[0]

    def read_all(self, keys: Iterable[str]) -> list[Any]:
        """The JSON values under some keys, None for each that does not exist; in one command."""
        wanted = list(keys)
        return [decoded(value) for value in cast("list[bytes | None]", self.ask(lambda: self.redis.mget(wanted)))]

    def now(self) -> float:
        """The time of Redis's clock, in seconds since the epoch: the only clock that all hosts of a job share."""
        seconds, microseconds = self.ask(self.redis.time)
        return float(seconds) + microseconds / 1e6


def decoded(value: Any) -> Any:
    """The value of JSON that Redis returned; None for a key that does not exist."""
    return None if value is None else json.loads(value)
