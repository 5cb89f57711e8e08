"""Redelivery of messages that a worker of an earlier version took and did not finish.

Earlier versions kept their unacknowledged messages under kombu's default keys, which all Celery applications of a Redis
database share. If such a worker died, its messages are returned to their queues here. Messages of other applications
are not touched.
"""

from __future__ import annotations

import json
import time
from typing import Any, cast

from redis import Redis
from redis.exceptions import RedisError

from tasks.names import DOMAIN_QUEUE, inner_queues
from tasks.store import lua
from tasks.store.redis_errors import is_passing
from worker.runtime.periodic_step import PeriodicStep

#: kombu's default keys: a hash of messages by delivery tag, and a sorted set of when each was taken.
_UNACKED, _INDEX = "unacked", "unacked_index"


class RestoreEarlierMessages(PeriodicStep):
    """Returns messages of dead workers of earlier versions to their queues, at the start and in each interval."""

    requires = ("celery.worker.consumer.tasks:Tasks",)
    #: Seconds without renewal after which the worker of a message counts as dead; also the interval of the search.
    visibility_timeout = 10

    def start(self, parent: Any) -> None:
        """Search now, and then in each interval."""
        self._foreign: set[bytes] = set()
        self._restore(parent)
        self.repeat(parent, self.visibility_timeout, self._restore, parent)

    def _restore(self, parent: Any) -> None:
        channel = parent.task_consumer.channel
        try:
            with channel.conn_or_acquire() as client:
                self._foreign = restore(client, time.time() - self.visibility_timeout, self._foreign)
        except (RedisError, OSError) as error:
            if isinstance(error, RedisError) and not is_passing(error):
                raise


def restore(redis: Redis, latest: float, foreign: set[bytes]) -> set[bytes]:
    """Return the messages of this program that were taken before `latest` (seconds since the epoch) to their queues.

    `foreign` are delivery tags known to belong to other applications. Returns those that still exist, and new ones.
    Raises RedisError.
    """
    tags = set(cast("list[bytes]", redis.zrangebyscore(_INDEX, "-inf", latest)))
    unknown = sorted(tags - foreign)
    if not unknown:
        return foreign & tags
    entries = cast("list[bytes | None]", redis.hmget(_UNACKED, [tag.decode() for tag in unknown]))
    for tag, entry in zip(unknown, entries, strict=True):
        ours = _ours(entry)
        if ours is None:
            foreign = foreign | {tag}
            continue
        queue, message = ours
        lua.PUT_BACK.run(
            redis,
            unacked_key=_UNACKED,
            index_key=_INDEX,
            queue=queue,
            tag=tag,
            entry=cast(bytes, entry),
            latest=latest,
            message=message,
        )
    return foreign & tags


def _ours(entry: bytes | None) -> tuple[str, str] | None:
    """The queue and the message of an entry of the hash; None if it is not a message of this program."""
    try:
        message, _, routing_key = json.loads(entry or b"null")
        message["headers"]["redelivered"] = True
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    domain_queue = str(routing_key).partition("#")[0]
    if not DOMAIN_QUEUE.fullmatch(domain_queue) or routing_key not in (domain_queue, *inner_queues(domain_queue)):
        return None
    return routing_key, json.dumps(message)
