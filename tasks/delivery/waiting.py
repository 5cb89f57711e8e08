"""Messages that no worker has begun with: those in a queue, and those that a worker took before it died.

A queue is a Redis list, which kombu fills from the left and empties from the right. What a worker has taken is in a
hash until it is acknowledged or delivered again.
"""

from __future__ import annotations

import json
from typing import cast

from redis import Redis

#: Messages that are read at a time.
_PAGE = 1_000


def is_waiting(redis: Redis, job_id: str, queue: str, unacked: str) -> bool:
    """Whether a message with the id `job_id` is in `queue` or in the hash `unacked`; reads all of both if not.

    The queue from left to right, so that messages which arrive meanwhile move none past the reader.
    """
    needle = json.dumps(job_id)[1:-1].encode()
    start = 0
    while page := cast("list[bytes]", redis.lrange(queue, start, start + _PAGE - 1)):
        if any(needle in message and _id_of(message) == job_id for message in page):
            return True
        start += len(page)
    taken = cast("list[bytes]", redis.hvals(unacked))
    return any(needle in entry and _id_of(entry, 0) == job_id for entry in taken)


def _id_of(data: bytes, *path: int) -> object:
    """The id of the message at `path` in some JSON; None where it is not one of Celery's."""
    try:
        message = json.loads(data)
        for part in path:
            message = message[part]
        return message["headers"]["id"]
    except (ValueError, TypeError, KeyError, IndexError, RecursionError):
        return None
