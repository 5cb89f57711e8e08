"""Messages that a worker of an earlier version took and did not finish.

Earlier versions kept their unacknowledged messages under kombu's default keys, which all Celery applications of a Redis
database share. What a dead worker of such a version held is put back into its queue here. The messages of other
applications are not touched.
"""

from __future__ import annotations

import json
import re
import time
from typing import Any, cast

from celery import bootsteps
from redis import Redis
from redis.exceptions import RedisError

from tasks.names import inner_queues
from tasks.store.redis_errors import is_passing

#: kombu's default keys: a hash of messages by delivery tag, and a sorted set of when each was taken.
_UNACKED, _INDEX = "unacked", "unacked_index"
#: The queue of a domain, without the suffix of an inner queue.
_DOMAIN_QUEUE = re.compile(r"forkvm(\.[A-Za-z0-9_.-]+)?")

#: Moves a message back into its queue, unless its worker has renewed or finished it meanwhile.
#:
#: KEYS: the hash, the index, the queue. ARGV: delivery tag, the entry as it was read, the latest time, the message.
_PUT_BACK = """
local score = redis.call('ZSCORE', KEYS[2], ARGV[1])
if not score or tonumber(score) > tonumber(ARGV[3]) or redis.call('HGET', KEYS[1], ARGV[1]) ~= ARGV[2] then
    return 0
end
redis.call('RPUSH', KEYS[3], ARGV[4])
redis.call('HDEL', KEYS[1], ARGV[1])
redis.call('ZREM', KEYS[2], ARGV[1])
return 1
"""


class Inheritance(bootsteps.StartStopStep):
    """Puts messages of dead workers of earlier versions back, at the start and again and again."""

    requires = ("celery.worker.consumer.tasks:Tasks",)
    #: Seconds after which an unrenewed message belongs to a dead worker; and seconds between two looks.
    visibility_timeout = 10

    def start(self, parent: Any) -> None:
        """Look now, and then after each timeout."""
        self._foreign: set[bytes] = set()
        self._look(parent)
        self._timer = parent.timer.call_repeatedly(self.visibility_timeout, self._look, (parent,))

    def stop(self, parent: Any) -> None:
        """Stop looking."""
        self._timer.cancel()

    def _look(self, parent: Any) -> None:
        channel = parent.task_consumer.channel
        try:
            with channel.conn_or_acquire() as client:
                self._foreign = put_back(client, time.time() - self.visibility_timeout, self._foreign)
        except (RedisError, OSError) as error:
            if isinstance(error, RedisError) and not is_passing(error):
                raise


def put_back(redis: Redis, latest: float, foreign: set[bytes]) -> set[bytes]:
    """Put back the messages of this program that were taken before `latest` (seconds since the epoch).

    `foreign`: delivery tags that are known to be another application's. Returns those that still are there.
    Raises RedisError.
    """
    tags = set(cast("list[bytes]", redis.zrangebyscore(_INDEX, "-inf", latest)))
    unknown = sorted(tags - foreign)
    if not unknown:
        return foreign & tags
    script = redis.register_script(_PUT_BACK)
    entries = cast("list[bytes | None]", redis.hmget(_UNACKED, [tag.decode() for tag in unknown]))
    for tag, entry in zip(unknown, entries, strict=True):
        ours = _ours(entry)
        if ours is None:
            foreign = foreign | {tag}
            continue
        queue, message = ours
        script(keys=[_UNACKED, _INDEX, queue], args=[tag, cast(bytes, entry), latest, message])
    return foreign & tags


def _ours(entry: bytes | None) -> tuple[str, str] | None:
    """The queue and the message in an entry of the hash; None if it is not a message of this program."""
    try:
        message, _, routing_key = json.loads(entry or b"null")
        message["headers"]["redelivered"] = True
    except (ValueError, TypeError, KeyError):
        return None
    domain_queue = str(routing_key).partition("#")[0]
    if not _DOMAIN_QUEUE.fullmatch(domain_queue) or routing_key not in (domain_queue, *inner_queues(domain_queue)):
        return None
    return routing_key, json.dumps(message)
