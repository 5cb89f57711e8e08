"""Timeouts of the connections to Redis, of workers and commands alike.

A peer that disappears (an expired NAT entry, a network partition) does not close the connection. Without a timeout, a
read from it would never return. The longest wait that is normal is kombu's BRPOP of 1 s.
"""

from __future__ import annotations

import socket
from typing import Any

#: For an answer, in seconds. A command that takes longer is sent again, which is harmless.
_ANSWER_SECONDS = 5.0
#: For a new connection, in seconds.
_CONNECT_SECONDS = 5.0
#: Interval in which a connection that waits for messages or commands is checked, in seconds.
_CHECK_SECONDS = 10
#: For connections on which no answer is awaited; see tcp(7). TCP_USER_TIMEOUT is in ms, the others in s.
_KEEPALIVE = {
    socket.TCP_KEEPIDLE: 15,
    socket.TCP_KEEPINTVL: 5,
    socket.TCP_KEEPCNT: 3,
    socket.TCP_USER_TIMEOUT: 20_000,
}


def broker_timeouts() -> dict[str, Any]:
    """The timeouts as kombu's transport options."""
    return {
        "socket_timeout": _ANSWER_SECONDS,
        "socket_connect_timeout": _CONNECT_SECONDS,
        "socket_keepalive": True,
        "socket_keepalive_options": _KEEPALIVE,
        "health_check_interval": _CHECK_SECONDS,
    }


def result_timeouts() -> dict[str, Any]:
    """The timeouts as settings of Celery's result backend, which has no setting for keepalive options."""
    return {
        "redis_socket_timeout": _ANSWER_SECONDS,
        "redis_socket_connect_timeout": _CONNECT_SECONDS,
        "redis_backend_health_check_interval": _CHECK_SECONDS,
    }
