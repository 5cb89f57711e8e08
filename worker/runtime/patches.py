"""Patches of bugs in kombu 5.7, Celery 5.7 and billiard 4.3.

kombu's bugs stop a worker, block it or lose a message when a connection to Redis is lost. Celery's delays the shutdown
of a worker.
"""

from __future__ import annotations

import json
import logging
import signal
import time
from contextlib import suppress
from functools import cache
from multiprocessing.connection import wait
from typing import Any

import billiard.pool
from billiard.pool import TERMINATE, WorkersJoined
from celery import signals
from celery.concurrency.asynpool import ResultHandler
from celery.worker.heartbeat import Heart
from kombu.transport import virtual
from kombu.transport.redis import Channel, QoS
from kombu.utils.encoding import bytes_to_str
from redis.exceptions import ConnectionError, OutOfMemoryError, RedisError, ResponseError

from tasks import events
from tasks.names import job_fields
from tasks.store.redis_errors import cause, is_passing

log = logging.getLogger(__name__)


@cache  # once a process
def patch_closed_channels() -> None:
    """Make a channel raise ConnectionError if its connection is closed.

    When Redis goes away, Celery closes the connection, and then uses the closed channel to acknowledge finished tasks
    and to return unacknowledged messages. kombu's Redis channel raises AttributeError ('NoneType' object has no
    attribute 'hostname'), which Celery does not handle, so the worker ends. Celery handles ConnectionError everywhere.
    """
    channel: Any = Channel  # the method is private
    original = channel._connparams

    def connparams(self: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(self.connection, "client", None) is None:
            raise ConnectionError("the channel's connection is closed")
        return original(self, *args, **kwargs)

    channel._connparams = connparams


@cache  # once a process
def patch_close_of_channels() -> None:
    """Close a channel also if the answer to its last BRPOP is an error.

    kombu reads that answer before it closes the channel's connections, and an error ends the close: READONLY from a
    Redis that has become a replica, or the end of the connection. Each such loss would leave sockets open.
    """
    channel: Any = Channel
    original = channel.close

    def close(self: Any) -> None:
        try:
            original(self)
        except (RedisError, OSError):
            original(self)  # the answer is read now

    channel.close = close


@cache  # once a process
def patch_connections_of_children() -> None:
    """Close inherited broker sockets in forked children.

    A child that is forked after the worker has connected inherits the sockets on which the worker waits for messages.
    kombu tries to close them, but redis-py's connection pool drops its connections first when it is used in another
    process. An open copy has two effects:

    - If only the worker dies, the connection stays open, and Redis sends the next message to it: the message is lost.
    - If the worker closes the connection, epoll still reports events for it (epoll(7): a file is removed when its last
      descriptor is closed). The worker's event loop spins. When the next connection gets the same descriptor number,
      the worker reads from it without having sent a request, and blocks.
    """
    channel: Any = Channel  # the method is private
    original = channel._after_fork

    def after_fork(self: Any) -> None:
        existing = vars(self)  # getattr would create the client
        for client in ("client", "subclient"):
            connection = getattr(existing.get(client), "connection", None)
            if connection is not None:
                connection.disconnect()  # only closes the socket, since another process opened it
        original(self)

    channel._after_fork = after_fork


#: Messages that were taken from their queue and could not be recorded as taken, with exchange and routing key.
_unrecorded: list[tuple[dict[str, Any], str, str]] = []


@cache  # once a process
def patch_unacked_messages() -> None:
    """Keep messages that Redis does not let kombu record as taken, acknowledged or rejected.

    kombu takes a message (BRPOP) in one step and records it (HSET unacked) in another. If the second fails, only this
    process has the message, and kombu drops it. Here it is kept until `restore_unrecorded` returns it to its queue.

    A full Redis refuses kombu's transaction for an acknowledgement too, although that frees memory. Then a finished
    message would never be acknowledged, and the lease of a rejected one would keep other workers from it.
    """
    qos: Any = QoS
    append, ack, reject = qos.append, qos.ack, qos.reject

    def append_or_keep(self: Any, message: Any, delivery_tag: str) -> None:
        try:
            append(self, message, delivery_tag)
        except Exception as error:
            delivery = message.delivery_info
            _unrecorded.append((message._raw, delivery["exchange"], delivery["routing_key"]))
            log.warning("a message could not be recorded as taken, and goes back to its queue: %s", cause(error))
            raise ConnectionError(f"a message could not be recorded as taken: {cause(error)}") from error

    def ack_also_when_full(self: Any, delivery_tag: str) -> None:
        try:
            ack(self, delivery_tag)
        except OutOfMemoryError:
            with self.channel.conn_or_acquire() as client:
                client.zrem(self.unacked_index_key, delivery_tag)
                client.hdel(self.unacked_key, delivery_tag)
            virtual.QoS.ack(self, delivery_tag)
        except ResponseError as error:
            _stop_renewal(self, delivery_tag, error)

    def reject_also_when_full(self: Any, delivery_tag: str, requeue: bool = False) -> None:
        try:
            reject(self, delivery_tag, requeue)
        except ResponseError as error:
            _stop_renewal(self, delivery_tag, error)

    qos.append, qos.ack, qos.reject = append_or_keep, ack_also_when_full, reject_also_when_full


@cache  # once a process
def report_expired_leases() -> None:
    """Report each message that kombu returns to its queue because its worker no longer renews the lease.

    An entry that is not a message would end the search each time, before the messages behind it, or be logged with its
    content. It is reported once, and left in the hash without its time, so that no search finds it again.
    """
    qos: Any = QoS
    restore_visible, restore_by_tag = qos.restore_visible, qos.restore_by_tag

    def restore_expired(self: Any, *args: Any, **kwargs: Any) -> None:
        self.restores_expired = True
        try:
            restore_visible(self, *args, **kwargs)
        finally:
            self.restores_expired = False

    def restore_and_report(self: Any, tag: Any, *args: Any, **kwargs: Any) -> None:
        if not getattr(self, "restores_expired", False):
            restore_by_tag(self, tag, *args, **kwargs)
            return
        with self.channel.conn_or_acquire() as client:
            entry = client.hget(self.unacked_key, tag)
            headers = _headers_of_unacked(entry)
            if entry is not None and headers is None:
                name = bytes_to_str(tag)
                line = "the entry %r of %s is not a message, and is left there; to remove it: HDEL %s %r"
                log.warning(line, name, self.unacked_key, self.unacked_key, name)
                client.zrem(self.unacked_index_key, tag)
                return
        restore_by_tag(self, tag, *args, **kwargs)
        ids = [(headers or {}).get(name) for name in ("task", "id")]
        line = "a message is delivered again: the worker that had it no longer renews its lease"
        log.warning(line, extra=job_fields(*map(str, ids)) if all(ids) else {})
        events.happened("redelivery", "worker_lost")

    qos.restore_visible, qos.restore_by_tag = restore_expired, restore_and_report


def _headers_of_unacked(entry: bytes | None) -> dict[str, Any] | None:
    """The headers of a message in kombu's hash; None for what kombu could not return to a queue."""
    try:
        message, exchange, routing_key = json.loads(entry or b"null")
        headers, properties = message["headers"], message["properties"]
        delivery = properties["delivery_info"]
    except (ValueError, TypeError, KeyError, IndexError, RecursionError):
        return None
    is_message = [type(value) for value in (headers, delivery, exchange, routing_key)] == [dict, dict, str, str]
    return headers if is_message else None


@cache  # once a process
def patch_search_for_lost_messages() -> None:
    """Search for messages of dead workers only if there may be one.

    kombu takes and releases a lock in Redis for each search, in each interval of each worker: five commands. One shows
    whether a message has not been renewed for the visibility timeout.
    """
    qos: Any = QoS
    restore = qos.restore_visible

    def restore_if_any(self: Any, *args: Any, **kwargs: Any) -> None:
        with self.channel.conn_or_acquire() as client:
            is_any = client.zcount(self.unacked_index_key, "-inf", time.time() - self.visibility_timeout)
        if is_any:
            restore(self, *args, **kwargs)

    qos.restore_visible = restore_if_any


def _stop_renewal(qos: Any, delivery_tag: str, error: ResponseError) -> None:
    """Stop renewing the lease of a message if Redis refuses writes for now: it is redelivered, which is harmless."""
    if not isinstance(error, OutOfMemoryError) and not is_passing(error):
        raise error
    log.warning("a message will be redelivered because Redis refused a write: %s", cause(error))
    virtual.QoS.ack(qos, delivery_tag)


def restore_unrecorded(channel: Any) -> None:
    """Return messages that could not be recorded as taken to the head of their queue. Raises ConnectionError."""
    while _unrecorded:
        payload, exchange, routing_key = _unrecorded[-1]
        try:
            with channel.conn_or_acquire() as client:
                channel._do_restore_message(payload, exchange, routing_key, client)
        except RedisError as error:
            raise ConnectionError(f"a message could not be returned to its queue: {cause(error)}") from error
        _unrecorded.pop()


@cache  # once a process
def patch_heartbeat_events() -> None:
    """Send each event of the worker itself (worker-online, worker-heartbeat) with one try.

    Celery's main process sends them between its other work, and tries again until Redis accepts them. With a Redis
    that hangs, or refuses the event's channel, its loop would not turn, and a probe would restart the worker. Here an
    error of the connection is raised: the worker connects again. An event that Redis refuses is left out.
    """
    heart: Any = Heart  # the method is private
    original = heart._send

    def send_once(self: Any, event: str, retry: bool = True) -> None:
        self.eventer.buffer_while_offline = not retry  # Celery does not retry while it stops: then it raises nothing
        try:
            original(self, event, retry=False)
        except ResponseError as error:
            log.debug("an event of the worker was not sent: %s", cause(error))
        finally:
            self.eventer.buffer_while_offline = True

    heart._send = send_once


@cache  # once a process
def ignore_soft_time_limits() -> None:
    """Ignore SIGUSR1 in children.

    billiard raises SoftTimeLimitExceeded on this signal, at any point of the task, and the fork would fail. A client's
    soft time limit is applied as its hard one (`tasks.delivery.message.Message`).
    """
    pool: Any = billiard.pool  # None is its value on systems without the signal
    pool.SIG_SOFT_TIMEOUT = None
    signals.worker_process_init.connect(_ignore_sigusr1)


def _ignore_sigusr1(**_: Any) -> None:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


#: Interval in which a worker that shuts down checks for ended children, in seconds.
_CHECK_SECONDS = 0.1
#: How often a child that ends checks, every 0.1 s, that its results were read. billiard's value is 300.
_CHILD_CHECKS = 20


@cache  # once a process
def patch_end_of_children() -> None:
    """Make a worker that shuts down (SIGTERM) read the results of its children until the last child has ended.

    Celery 5.7.0 stops reading when it knows of no running task. It does not count tasks that were sent to a child but
    not yet confirmed by it (`AsynPool.flush`, on shutdown and on a lost connection). A child of billiard 4.3.2 ends
    only when its last result was read, or after 30 s (`Worker._ensure_messages_consumed`), and the worker waits for
    it. Also, Celery reads from one child after the other, and waits 0.5 s for each that sends nothing.

    The message of an uncounted task goes back to its queue. The worker that takes it finds the task done. After a lost
    connection, a result is sometimes never counted as read; the reason is not known. So a child waits only 2 s for
    that. The wait protects nothing: the results of an ended child are read as well.
    """
    billiard.pool.GUARANTEE_MESSAGE_CONSUMPTION_RETRY_LIMIT = _CHILD_CHECKS
    handler: Any = ResultHandler

    def read_to_the_end(self: Any) -> None:
        unread = set(self.fileno_to_outq)
        with suppress(WorkersJoined):
            while unread and self._state != TERMINATE:
                if self.check_timeouts is not None:
                    self.check_timeouts()
                for fd in wait(unread, _CHECK_SECONDS):
                    self._flush_outqueue(fd, unread.discard, self.fileno_to_outq, self.on_state_change)
                self.join_exited_workers(shutdown=True)

    handler.on_stop_not_started = read_to_the_end
