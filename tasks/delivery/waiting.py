"""Messages that no worker has started: those in a queue, and those that a worker took before it died.

A queue is a Redis list, or one for each priority. kombu pushes messages on its left and pops them on its right. A
message that a worker has taken is in a hash until it is acknowledged or delivered again.
"""

from __future__ import annotations

import json
from typing import cast

from redis import Redis

from tasks.store.queues import lists_of

#: Messages per read.
_PAGE = 1_000


def is_waiting(redis: Redis, job_id: str, queue: str, unacked: str) -> bool:
    """Whether a message with the id `job_id` is in `queue` or in the hash `unacked`; if not, it reads all of both.

    It reads a list from left to right, so that messages that arrive meanwhile cannot make it skip one.
    """
    needle = json.dumps(job_id)[1:-1].encode()
    for each in lists_of(queue):
        start = 0
        while page := cast("list[bytes]", redis.lrange(each, start, start + _PAGE - 1)):
            if any(needle in message and _id_of(message) == job_id for message in page):
                return True
            start += len(page)
    taken = cast("list[bytes]", redis.hvals(unacked))
    return any(needle in entry and _id_of(entry, 0) == job_id for entry in taken)


def _id_of(data: bytes, *path: int) -> object:
    """The id of the message at `path` in JSON data; None if it is not a Celery message."""
    try:
        message = json.loads(data)
        for part in path:
            message = message[part]
        return message["headers"]["id"]
    except (ValueError, TypeError, KeyError, IndexError, RecursionError):
        return None
