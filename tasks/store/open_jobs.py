"""Jobs that have not ended, for the sweep that finds those whose messages were lost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, cast

from tasks.store import keys
from tasks.store.claims import Claim
from tasks.store.connection import Connection
from tasks.store.job_states import is_final

#: How many jobs are read at once.
_PAGE = 500


class OpenJob(NamedTuple):
    """A job that has not ended."""

    job_id: str
    #: The last heartbeat that a sweep saw; see `tasks.copier.staging.control_directory.last_sign_of_life`.
    heartbeat: int
    claim: Claim


@dataclass(frozen=True)
class OpenJobs:
    """The jobs that have not ended. Each method raises RedisError."""

    connection: Connection

    def any(self) -> bool:
        """Whether there may be jobs that have not ended, of any queue."""
        return bool(self.connection.ask(lambda: self.connection.redis.zcard(keys.OPEN.pattern)))

    def of_queue(self, queue: str) -> list[OpenJob]:
        """The jobs of a queue that have not ended. Removes from the list in Redis those of any queue that have."""
        connection = self.connection
        found = connection.ask(lambda: connection.redis.zrange(keys.OPEN.pattern, 0, -1, withscores=True))
        entries = cast("list[tuple[bytes, float]]", found)
        return [job for n in range(0, len(entries), _PAGE) for job in self._open_ones(entries[n : n + _PAGE], queue)]

    def _open_ones(self, entries: list[tuple[bytes, float]], queue: str) -> Iterator[OpenJob]:
        connection = self.connection
        ids = [member.decode() for member, _ in entries]
        claims = connection.read_all(map(keys.CLAIM.of, ids))
        results = connection.read_all(map(keys.RESULT.of, ids))
        records = connection.read_all(map(connection.state_key, ids))
        ended = [
            claim is None or (result is not None and is_final(record))
            for claim, result, record in zip(claims, results, records, strict=True)
        ]
        if any(ended):
            gone = [member for (member, _), has_ended in zip(entries, ended, strict=True) if has_ended]
            connection.ask(lambda: connection.redis.zrem(keys.OPEN.pattern, *gone))
        for (_, heartbeat), job_id, claim, has_ended in zip(entries, ids, claims, ended, strict=True):
            if not has_ended and claim["queue"] == queue:
                yield OpenJob(job_id, int(heartbeat), claim)

    def store_heartbeat(self, job_id: str, heartbeat: int) -> None:
        """Store the heartbeat that a sweep saw of a job, unless the job has ended since."""
        connection = self.connection
        connection.ask(lambda: connection.redis.zadd(keys.OPEN.pattern, {job_id: heartbeat}, xx=True))

    def count_loss(self, message_id: str) -> int:
        """Count one more process that died of a message; returns how many did so far.

        Does not wait while Redis is away.
        """
        key = keys.LOSSES.of(message_id)
        with self.connection.redis.pipeline(transaction=True) as pipe:
            pipe.execute_command("INCR", key)  # type: ignore[no-untyped-call]  # redis-py's `incr` sends INCRBY
            pipe.expire(key, self.connection.expires)
            return int(pipe.execute()[0])
