"""Faults of kombu 5.7 and Celery 5.7, mended until they do it.

Those of kombu end a worker, hold it up or lose a message when a connection to Redis ends; that of Celery holds up a
worker that is to end.
"""

from __future__ import annotations

import logging
import signal
from contextlib import suppress
from functools import cache
from multiprocessing.connection import wait
from typing import Any

import billiard.pool
from billiard.pool import TERMINATE, WorkersJoined
from celery import signals
from celery.concurrency.asynpool import ResultHandler
from kombu.transport import virtual
from kombu.transport.redis import Channel, QoS
from redis.exceptions import ConnectionError, OutOfMemoryError, RedisError, ResponseError

from tasks.store.redis_errors import cause, is_passing

log = logging.getLogger(__name__)


@cache  # once a process
def patch_closed_channels() -> None:
    """Have a channel whose connection is closed say so with a ConnectionError.

    When Redis goes away, Celery closes the connection, and then acknowledges what ends meanwhile, or puts back what
    is unacknowledged, over the closed channel. kombu's redis Channel answers with AttributeError ('NoneType' object
    has no attribute 'hostname'), which nobody expects, and the worker ends; a ConnectionError is expected everywhere.
    """
    channel: Any = Channel  # the method is private
    original = channel._connparams

    def connparams(self: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(self.connection, "client", None) is None:
            raise ConnectionError("the channel's connection is closed")
        return original(self, *args, **kwargs)

    channel._connparams = connparams


@cache  # once a process
def patch_connections_of_children() -> None:
    """Have no child keep the connections on which the worker waits for messages.

    A child that is started after the worker has connected gets copies of their sockets. kombu means to close them, but
    redis-py's pool, asked in another process, forgets its connections first. Two things come of it:

    - Where the worker dies alone, the copy keeps the connection open, and Redis gives it the next message: to nobody.
    - Where the worker closes the connection, epoll goes on to tell of it (epoll(7): a file is removed when its last
      descriptor is closed). The worker's loop turns without a pause; and once the next connection has the same number,
      it reads from that one though it asked for nothing, and waits for ever.
    """
    channel: Any = Channel  # the method is private
    original = channel._after_fork

    def after_fork(self: Any) -> None:
        made = vars(self)  # an attribute that is asked for is made
        for client in ("client", "subclient"):
            connection = getattr(made.get(client), "connection", None)
            if connection is not None:
                connection.disconnect()  # in another process than its own it only closes the socket
        original(self)

    channel._after_fork = after_fork


#: Messages, each with its exchange and routing key, that were taken from their queue and not noted as taken.
_unnoted: list[tuple[dict[str, Any], str, str]] = []


@cache  # once a process
def patch_unacknowledged_messages() -> None:
    """Lose no message, and no slot for one, when Redis does not let it be noted as taken, done, or handed back.

    kombu takes a message (BRPOP) in one step and notes it (HSET unacked) in another one. When that fails, the message
    is nowhere but in this process, which forgets it; `put_unnoted_back` is for when Redis is back. A full Redis refuses
    also what would make room, since kombu asks for it in a transaction; then a message that was done would count as at
    work for ever, and one that was handed back would be kept from others by its lease.
    """
    books: Any = QoS
    append, ack, reject = books.append, books.ack, books.reject

    def append_or_keep(self: Any, message: Any, delivery_tag: str) -> None:
        try:
            append(self, message, delivery_tag)
        except Exception as error:
            delivery = message.delivery_info
            _unnoted.append((message._raw, delivery["exchange"], delivery["routing_key"]))
            raise ConnectionError(f"a message could not be noted as taken: {cause(error)}") from error

    def ack_also_when_full(self: Any, delivery_tag: str) -> None:
        try:
            ack(self, delivery_tag)
        except OutOfMemoryError:
            with self.channel.conn_or_acquire() as client:
                client.zrem(self.unacked_index_key, delivery_tag)
                client.hdel(self.unacked_key, delivery_tag)
            virtual.QoS.ack(self, delivery_tag)
        except ResponseError as error:
            _give_back(self, delivery_tag, error)

    def reject_also_when_full(self: Any, delivery_tag: str, requeue: bool = False) -> None:
        try:
            reject(self, delivery_tag, requeue)
        except ResponseError as error:
            _give_back(self, delivery_tag, error)

    books.append, books.ack, books.reject = append_or_keep, ack_also_when_full, reject_also_when_full


def _give_back(books: Any, delivery_tag: str, error: ResponseError) -> None:
    """Stop renewing a message where Redis refuses writes for a while: it is delivered again, which does no harm."""
    if not isinstance(error, OutOfMemoryError) and not is_passing(error):
        raise error
    log.warning("a message is delivered again, since Redis refused a write: %s", cause(error))
    virtual.QoS.ack(books, delivery_tag)


def put_unnoted_back(channel: Any) -> None:
    """Put what could not be noted as taken back into its queue, to be taken next. Raises ConnectionError."""
    while _unnoted:
        payload, exchange, routing_key = _unnoted[-1]
        try:
            with channel.conn_or_acquire() as client:
                channel._do_restore_message(payload, exchange, routing_key, client)
        except RedisError as error:
            raise ConnectionError(f"a message could not be put back: {cause(error)}") from error
        _unnoted.pop()


@cache  # once a process
def ignore_soft_time_limits() -> None:
    """Let SIGUSR1 do nothing in children.

    billiard raises SoftTimeLimitExceeded at it, in the middle of whatever the child does: it would be an error of the
    fork. A client's soft limit is its only limit here (`tasks.delivery.message.Message`).
    """
    pool: Any = billiard.pool  # it has None where there is no such signal
    pool.SIG_SOFT_TIMEOUT = None
    signals.worker_process_init.connect(_ignore_sigusr1)


def _ignore_sigusr1(**_: Any) -> None:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


#: How often a worker that ends looks after children that ended without a word, in seconds.
_LOOK_SECONDS = 0.1
#: How often a child that ends looks whether its results were read, every 0.1 s; billiard's is 300 times.
_CHILD_LOOKS = 20


@cache  # once a process
def patch_end_of_children() -> None:
    """Have a worker that was told to end (SIGTERM) read what its children say until the last of them has ended.

    Celery 5.7.0 reads on only for as long as it knows of a task at work, and forgets those that were given to a child
    and of which it did not read yet that they were taken up (`AsynPool.flush`: when it ends, and when its connection is
    lost). But a child of billiard 4.3.2 ends only when its last result was read, or after 30 s more
    (`Worker._ensure_messages_consumed`), and the worker waits for its children. Where Celery does read, it waits half a
    second at each child that says nothing, one after the other.

    What was forgotten is done, and its message goes back to its queue: whoever takes it finds it done. After a loss of
    the connection it can be that a result is never counted as read, for a reason not known. A child waits for that for
    two seconds here: the wait guards nothing, since what it wrote is read also when it has ended.
    """
    billiard.pool.GUARANTEE_MESSAGE_CONSUMPTION_RETRY_LIMIT = _CHILD_LOOKS
    handler: Any = ResultHandler

    def read_to_the_end(self: Any) -> None:
        unread = set(self.fileno_to_outq)
        with suppress(WorkersJoined):
            while unread and self._state != TERMINATE:
                if self.check_timeouts is not None:
                    self.check_timeouts()
                for fd in wait(unread, _LOOK_SECONDS):
                    self._flush_outqueue(fd, unread.discard, self.fileno_to_outq, self.on_state_change)
                self.join_exited_workers(shutdown=True)

    handler.on_stop_not_started = read_to_the_end
