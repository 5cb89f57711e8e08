"""A program: the close of a channel whose last BRPOP Redis answers with an error, as after a failover.

    python -m tests.support.system.closed_channel SOCKET patched|unpatched

It makes the Redis at the unix socket a replica while the channel waits for a message. It prints how many of the
process's sockets are left when the channel is closed.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from kombu import Connection, Consumer, Queue
from kombu.asynchronous import Hub
from redis import Redis
from redis.exceptions import RedisError

from worker.runtime.patches import patch_close_of_channels
from worker.runtime.timeouts import broker_timeouts


def main(path: str, mode: str) -> None:
    """Run the program."""
    if mode == "patched":
        patch_close_of_channels()
    gc.disable()  # so that no collection closes what the channel leaves
    with Redis(unix_socket_path=path) as redis:
        connection: Any = Connection(f"redis+socket://{path}", transport_options=broker_timeouts())
        channel, hub = connection.channel(), Hub()
        channel.brpop_timeout = 60
        Consumer(channel, [Queue("forkvm")], accept=["json"]).consume()
        connection.transport.register_with_event_loop(connection.connection, hub)
        for tick in list(hub.on_tick):  # sends BRPOP
            tick()
        _wait_for(redis, blocked=1)

        redis.replicaof("127.0.0.1", "1")
        _wait_for(redis, blocked=0)
        with suppress(RedisError):
            channel.close()
        redis.replicaof("NO", "ONE")
    print(_sockets())


def _wait_for(redis: Redis, *, blocked: int) -> None:
    while redis.info("clients")["blocked_clients"] != blocked:
        time.sleep(0.01)


def _sockets() -> int:
    links = []
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            links.append(os.readlink(entry))
    return sum(link.startswith("socket:") for link in links)


if __name__ == "__main__":
    main(*sys.argv[1:])
