"""How many messages the queues hold. The functions take the broker's Redis, and raise RedisError."""

from __future__ import annotations

from collections.abc import Sequence

from redis import Redis

from tasks.store import lua


def waiting_messages(redis: Redis, queues: Sequence[str]) -> dict[str, int]:
    """The number of messages that wait in each queue."""
    with redis.pipeline(transaction=False) as pipe:
        for queue in queues:
            pipe.llen(queue)
        return dict(zip(queues, pipe.execute(), strict=True))


def unacked_messages(redis: Redis, unacked_key: str, queues: Sequence[str]) -> dict[str, int]:
    """The number of messages that workers have taken from each queue and not finished, from kombu's hash."""
    counts = lua.UNACKED_MESSAGES.run(redis, unacked_key=unacked_key, more_args=queues)
    return dict(zip(queues, counts, strict=True))
