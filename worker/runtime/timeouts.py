"""How long a connection to Redis may be silent, for each connection of workers and commands.

A peer that vanishes without a word (a dead NAT entry, a node that was cut off) closes nothing: without bounds, whoever
waits for its answer waits forever. Redis itself keeps nobody waiting for longer than kombu's BRPOP, which is 1 s.
"""

from __future__ import annotations

import socket
from typing import Any

#: For an answer, in seconds. A Redis that is busy for longer is asked again, which does no harm.
_ANSWER_SECONDS = 5.0
#: For a new connection, in seconds.
_CONNECT_SECONDS = 5.0
#: How often a connection that waits for messages or commands is checked, in seconds.
_CHECK_SECONDS = 10
#: tcp(7): first probe of an idle connection, further ones, and how many; and how long data may be unacknowledged, in
#: milliseconds. They are for whoever does not wait for an answer at the moment.
_KEEPALIVE = {
    socket.TCP_KEEPIDLE: 15,
    socket.TCP_KEEPINTVL: 5,
    socket.TCP_KEEPCNT: 3,
    socket.TCP_USER_TIMEOUT: 20_000,
}


def broker_bounds() -> dict[str, Any]:
    """The bounds as kombu's transport options."""
    return {
        "socket_timeout": _ANSWER_SECONDS,
        "socket_connect_timeout": _CONNECT_SECONDS,
        "socket_keepalive": True,
        "socket_keepalive_options": _KEEPALIVE,
        "health_check_interval": _CHECK_SECONDS,
    }


def result_bounds() -> dict[str, Any]:
    """The bounds as settings of Celery's result backend. Keepalive is redis-py's own default; here it does no more."""
    return {
        "redis_socket_timeout": _ANSWER_SECONDS,
        "redis_socket_connect_timeout": _CONNECT_SECONDS,
        "redis_backend_health_check_interval": _CHECK_SECONDS,
    }
