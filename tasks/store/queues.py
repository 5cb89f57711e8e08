"""How many messages the queues hold. The functions take the broker's Redis, and raise RedisError.

A client may send a message with a priority. kombu's Redis transport then puts it into a list of its own, and a worker
consumes all lists of a queue.
"""

from __future__ import annotations

from collections.abc import Sequence

from redis import Redis

from tasks.store import lua

#: What kombu puts between a queue and a priority, and its priorities other than 0 (`Channel.sep`, `PRIORITY_STEPS`).
_SEPARATOR = "\x06\x16"
_PRIORITIES = (3, 6, 9)


def lists_of(queue: str) -> list[str]:
    """The lists in which the messages of a queue wait. A worker takes from the first one that is not empty."""
    return [queue, *(f"{queue}{_SEPARATOR}{priority}" for priority in _PRIORITIES)]


def waiting_messages(redis: Redis, queues: Sequence[str]) -> dict[str, int]:
    """The number of messages that wait in each queue."""
    with redis.pipeline(transaction=False) as pipe:
        for queue in queues:
            for each in lists_of(queue):
                pipe.llen(each)
        lengths = iter(pipe.execute())
    return {queue: sum(next(lengths) for _ in lists_of(queue)) for queue in queues}


def unacked_messages(redis: Redis, unacked_key: str, queues: Sequence[str]) -> dict[str, int]:
    """The number of messages that workers have taken from each queue and not finished, from kombu's hash."""
    counts = lua.UNACKED_MESSAGES.run(redis, unacked_key=unacked_key, more_args=queues)
    return dict(zip(queues, counts, strict=True))
