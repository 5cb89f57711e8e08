"""The check whether Redis permits its user all commands of forkvm, on the keys and channels that it uses.

Redis checks the rights of a command when it is queued in a transaction. The transaction is never executed: the
connection is closed. So nothing is written.
"""

from __future__ import annotations

import re

from redis import Redis
from redis.exceptions import ConnectionError, NoPermissionError, ResponseError, TimeoutError

from tasks.store.keys import OPEN, STATE
from tasks.store.redis_errors import is_refused
from worker.checks.check import Check
from worker.runtime.configuration import UNACKED_KEY

_STATE = STATE.pattern.format(id="forkvm-doctor")
_QUEUE, _BINDING, _OPEN = "forkvm", "_kombu.binding.forkvm", OPEN.pattern
_INDEX = f"{UNACKED_KEY}_index"

#: One call of each command, as forkvm and Celery make it. MULTI opens the transaction. INFO has a check of
#: its own. EXEC, HELLO, WATCH and the commands of subscriptions cannot be queued.
_CALLS: tuple[tuple[str, ...], ...] = (
    *(("PING",), ("SELECT", "0"), ("TIME",)),
    *(("GET", _STATE), ("MGET", _STATE), ("SET", _STATE, ""), ("SETEX", _STATE, "1", ""), ("DEL", _STATE)),
    *(("EXISTS", _STATE), ("EXPIRE", _STATE, "1"), ("INCR", _STATE), ("GETBIT", _STATE, "0")),
    ("SETBIT", _STATE, "0", "0"),
    *(("LPUSH", _QUEUE, ""), ("RPUSH", _QUEUE, ""), ("BRPOP", _QUEUE, "1"), ("LLEN", _QUEUE)),
    *(("LRANGE", _QUEUE, "0", "0"), ("LTRIM", _QUEUE, "0", "0")),
    *(("HSET", UNACKED_KEY, "", ""), ("HGET", UNACKED_KEY, ""), ("HMGET", UNACKED_KEY, ""), ("HGETALL", UNACKED_KEY)),
    *(("HVALS", UNACKED_KEY), ("HDEL", UNACKED_KEY, ""), ("HINCRBY", UNACKED_KEY, "", "1")),
    *(("SADD", _BINDING, ""), ("SREM", _BINDING, ""), ("SMEMBERS", _BINDING)),
    *(("ZADD", _OPEN, "0", ""), ("ZREM", _OPEN, ""), ("ZSCORE", _OPEN, ""), ("ZRANGE", _OPEN, "0", "0")),
    *(("ZRANGEBYSCORE", _INDEX, "0", "0"), ("ZREVRANGEBYSCORE", _INDEX, "0", "0")),
    *(("ZREMRANGEBYSCORE", _OPEN, "0", "0"), ("ZCARD", _OPEN), ("ZCOUNT", _INDEX, "0", "0")),
    *(("PUBLISH", _STATE, ""), ("EVALSHA", "0" * 40, "0"), ("SCRIPT", "LOAD", ""), ("SCRIPT", "EXISTS", "0" * 40)),
)
COMMANDS = frozenset("|".join(call[:2]) if call[0] == "SCRIPT" else call[0] for call in _CALLS)
#: Redis names the command in its answer from version 7 on.
_ABOUT_KEYS = re.compile(r"\bkeys?\b|\bchannels?\b")


def rights_check(subject: str, redis: Redis) -> Check:
    """Check the rights of the user of `redis`. Raises ConnectionError, TimeoutError."""
    subject = f"{subject}: rights"
    missing = _refused(redis)
    if missing:
        found = f"its user may not use: {', '.join(missing)}"
        return Check(subject, "bad", found, "give it the rights that SECURITY.md lists")
    return Check(subject, "ok", f"its user may use the {len(COMMANDS)} commands that were tried")


def _refused(redis: Redis) -> list[str]:
    """The commands that the user may not use, with the key or channel where only that is refused."""
    connection = redis.connection_pool.get_connection()
    try:
        refused = []
        for call in (("MULTI",), *_CALLS):
            connection.send_command(*call)  # type: ignore[no-untyped-call]
            try:
                connection.read_response()
            except NoPermissionError as error:
                place = f" {call[1]}" if _ABOUT_KEYS.search(str(error)) and len(call) > 1 else ""
                refused.append(call[0] + place)
            except (ConnectionError, TimeoutError):
                raise
            except ResponseError as error:  # another refusal is not about rights
                if is_refused(error):
                    refused.append(f"{call[0]} (unknown there)")
        return refused
    finally:
        _close(redis, connection)


def _close(redis: Redis, connection: object) -> None:
    """Drop the transaction with its connection."""
    getattr(connection, "disconnect")()  # noqa: B009
    redis.connection_pool.release(connection)  # type: ignore[arg-type]
