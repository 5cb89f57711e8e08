"""One fault of kombu 5.7 that would end a worker when Redis goes away, mended until kombu does it."""

from __future__ import annotations

from typing import Any

from kombu.transport.redis import Channel
from redis.exceptions import ConnectionError


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
