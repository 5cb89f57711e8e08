"""Messages that wait in a queue: a Redis list, which kombu fills from the left and empties from the right."""

from __future__ import annotations

import json
from typing import cast

from redis import Redis

#: Messages that are read at a time.
_PAGE = 1_000


def is_waiting(redis: Redis, job_id: str, queue: str) -> bool:
    """Whether a message with the id `job_id` waits in `queue`; reads the whole queue where none does.

    From left to right, so that messages which arrive meanwhile move none past the reader.
    """
    needle = json.dumps(job_id)[1:-1].encode()
    start = 0
    while page := cast("list[bytes]", redis.lrange(queue, start, start + _PAGE - 1)):
        if any(needle in message and _id_of(message) == job_id for message in page):
            return True
        start += len(page)
    return False


def _id_of(message: bytes) -> object:
    try:
        return json.loads(message)["headers"]["id"]
    except (ValueError, TypeError, KeyError, RecursionError):  # a message that is not Celery's
        return None
