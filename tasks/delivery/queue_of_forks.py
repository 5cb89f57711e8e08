"""The client's queue of a domain, from which a pool process takes messages itself.

kombu gives a worker one message at a time: three commands to Redis, a way through the main process to a pool process
and back, and an acknowledgement. A pool process that has just made a small fork takes those that wait in one command.

A message that is taken is in kombu's hash of unacknowledged messages until it is acknowledged. It is delivered again
when no process has renewed it for the visibility timeout.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

from celery import Celery
from kombu import Connection
from redis import Redis

from tasks.names import FORK_TASK
from tasks.store import lua

#: The connection to the broker of each process, by pid: a forked process must not use that of its parent.
_brokers: dict[int, Connection] = {}
#: The longest message that is taken, in bytes. Redis decodes it, which takes 10 microseconds for each kilobyte.
_LONGEST = 16 << 10


#: A header of a message that only a worker takes: kombu's, for one whose process died; or ours, for one that is not
#: plain. A worker removes ours.
Mark = Literal["redelivered", "ordinary"]


@dataclass(frozen=True)
class Taken:
    """A message that this process has taken."""

    tag: str
    #: As the client sent it.
    text: bytes


@dataclass(frozen=True)
class QueueOfForks:
    """A domain's queue. Each method raises RedisError and OSError."""

    redis: Redis
    name: str
    unacked_key: str

    @property
    def _index_key(self) -> str:
        return f"{self.unacked_key}_index"

    @property
    def _place(self) -> str:
        """The exchange and the routing key, as they follow a message in kombu's record of it."""
        return f'"",{json.dumps(self.name)}'

    def take(self, most: int, tag: str) -> list[Taken]:
        """Take the oldest messages, up to `most`, while each is a plain request for one fork.

        Their delivery tags begin with `tag`. See take_messages.lua for what is not plain: the worker takes that.
        """
        tag = f"{tag}.{uuid.uuid4().hex}"
        found = lua.TAKE_MESSAGES.run(
            self.redis,
            queue_key=self.name,
            unacked_key=self.unacked_key,
            index_key=self._index_key,
            most=most,
            longest=_LONGEST,
            task=FORK_TASK,
            now=time.time(),
            tag=tag,
            place=self._place,
        )
        return [Taken(f"{tag}.{n}", text) for n, text in enumerate(cast("list[bytes]", found), 1)]

    def acknowledge(self, tags: Iterable[str]) -> None:
        """Remove messages that are done."""
        done = list(tags)
        if done:
            with self.redis.pipeline(transaction=False) as pipe:
                pipe.zrem(self._index_key, *done)
                pipe.hdel(self.unacked_key, *done)
                pipe.execute()

    def renew(self, tags: Iterable[str]) -> None:
        """Renew the lease of messages, so that they are not delivered again."""
        now = time.time()
        taken = dict.fromkeys(tags, now)
        if taken:
            self.redis.zadd(self._index_key, taken, xx=True)

    def give_back(self, messages: Iterable[Taken], mark: Mark | None = None) -> None:
        """Return messages, the oldest first, to the head of the queue. No process takes those with a mark by `take`."""
        pairs = [(one.tag, _marked(one.text, mark) if mark else one.text) for one in messages]
        if pairs:
            lua.GIVE_BACK.run(
                self.redis,
                queue_key=self.name,
                unacked_key=self.unacked_key,
                index_key=self._index_key,
                more_args=[value for pair in reversed(pairs) for value in pair],
            )

    def give_back_of(self, tag: str) -> int:
        """Return the messages that a process took under tags that begin with `tag`, and died. Returns their number."""
        taken = cast("list[bytes]", self.redis.zrange(self._index_key, 0, -1))
        tags = [name.decode() for name in taken if name.startswith(f"{tag}.".encode())]
        entries = cast("list[bytes | None]", self.redis.hmget(self.unacked_key, tags)) if tags else []
        end = len(f",{self._place}]")
        lost = [Taken(name, entry[1:-end]) for name, entry in zip(tags, entries, strict=True) if entry is not None]
        self.give_back(lost, "redelivered")
        return len(lost)


def queue_of_forks(app: Celery, name: str) -> QueueOfForks:
    """The queue `name`, over this process's own connection to the broker. Raises OperationalError and OSError."""
    if _brokers.get(os.getpid()) is None:
        _brokers[os.getpid()] = app.connection_for_write()
    channel: Any = _brokers[os.getpid()].default_channel
    return QueueOfForks(channel.client, name, channel.unacked_key)


@contextmanager
def queue_of_message(message: Any) -> Iterator[QueueOfForks]:
    """The queue that a message of kombu's came from. Not over the channel's own connection: it waits for messages."""
    channel = message.channel
    with channel.conn_or_acquire() as client:
        yield QueueOfForks(client, str(message.delivery_info["routing_key"]), channel.unacked_key)


def _marked(text: bytes, mark: Mark) -> bytes:
    """The message with a mark. For one that only Redis can read as JSON, `null`: a worker refuses both alike."""
    try:
        message = json.loads(text)
    except (ValueError, RecursionError):
        return b"null"
    message["headers"][mark] = True
    return json.dumps(message).encode("ascii")
