"""Requests to cancel jobs."""

from __future__ import annotations

from dataclasses import dataclass

from tasks.store import keys, lua
from tasks.store.connection import Connection


@dataclass(frozen=True)
class Cancellations:
    """The requests to cancel jobs. Each method raises RedisError."""

    connection: Connection

    def request(self, job_id: str) -> None:
        """Request the cancellation of a job, also of one that no worker has started. No effect after its end.

        Does not wait while Redis is away.
        """
        lua.CANCEL.run(
            self.connection.redis,
            cancel_key=keys.CANCEL.of(job_id),
            result_key=keys.RESULT.of(job_id),
            flag=b"1",
            ttl=self.connection.open_expires,
        )

    def is_requested(self, job_id: str) -> bool:
        """Whether the cancellation of a job was requested."""
        return bool(self.connection.ask(lambda: self.connection.redis.exists(keys.CANCEL.of(job_id))))
