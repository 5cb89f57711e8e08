"""Faults of kombu 5.7 that end a worker or lose a message when Redis goes away, mended until kombu does it."""

from __future__ import annotations

from typing import Any

from kombu.transport import virtual
from kombu.transport.redis import Channel, QoS
from redis.exceptions import ConnectionError, OutOfMemoryError, RedisError


def mend_closed_channels() -> None:
    """Have a channel whose connection is closed say so with a ConnectionError.

    When Redis goes away, Celery closes the connection, and then acknowledges what ends meanwhile, or puts back what
    is unacknowledged, over the closed channel. kombu's redis Channel answers with AttributeError ('NoneType' object
    has no attribute 'hostname'), which nobody expects, and the worker ends; a ConnectionError is expected everywhere.
    """
    channel: Any = Channel  # the method is private
    original = channel._connparams
    if hasattr(original, "is_mended"):
        return

    def connparams(self: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(self.connection, "client", None) is None:
            raise ConnectionError("the channel's connection is closed")
        return original(self, *args, **kwargs)

    vars(connparams)["is_mended"] = True
    channel._connparams = connparams


#: Messages, each with its exchange and routing key, that were taken from their queue and not noted as taken.
_unnoted: list[tuple[dict[str, Any], str, str]] = []


def mend_books_of_messages() -> None:
    """Lose no message, and no slot for one, when Redis does not let it be noted as taken, done, or handed back.

    kombu takes a message (BRPOP) in one step and notes it (HSET unacked) in another one. When that fails, the message
    is nowhere but in this process, which forgets it; `put_unnoted_back` is for when Redis is back. A full Redis refuses
    also what would make room, since kombu asks for it in a transaction; then a message that was done would count as at
    work for ever, and one that was handed back would be kept from others by its lease.
    """
    books: Any = QoS
    append, ack, reject = books.append, books.ack, books.reject
    if hasattr(append, "is_mended"):
        return

    def append_or_keep(self: Any, message: Any, delivery_tag: str) -> None:
        try:
            append(self, message, delivery_tag)
        except Exception as error:
            delivery = message.delivery_info
            _unnoted.append((message._raw, delivery["exchange"], delivery["routing_key"]))
            raise ConnectionError(f"a message could not be noted as taken: {error}") from error

    def ack_also_when_full(self: Any, delivery_tag: str) -> None:
        try:
            ack(self, delivery_tag)
        except OutOfMemoryError:
            with self.channel.conn_or_acquire() as client:
                client.zrem(self.unacked_index_key, delivery_tag)
                client.hdel(self.unacked_key, delivery_tag)
            virtual.QoS.ack(self, delivery_tag)

    def reject_also_when_full(self: Any, delivery_tag: str, requeue: bool = False) -> None:
        try:
            reject(self, delivery_tag, requeue)
        except OutOfMemoryError:
            virtual.QoS.ack(self, delivery_tag)  # no longer renewed: it comes again when there is room

    vars(append_or_keep)["is_mended"] = True
    books.append, books.ack, books.reject = append_or_keep, ack_also_when_full, reject_also_when_full


def put_unnoted_back(channel: Any) -> None:
    """Put what could not be noted as taken back into its queue, to be taken next. Raises ConnectionError."""
    while _unnoted:
        payload, exchange, routing_key = _unnoted[-1]
        try:
            with channel.conn_or_acquire() as client:
                channel._do_restore_message(payload, exchange, routing_key, client)
        except RedisError as error:
            raise ConnectionError(f"a message could not be put back: {error}") from error
        _unnoted.pop()
