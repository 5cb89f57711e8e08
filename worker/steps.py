"""What a worker does beside its tasks, for as long as its consumer's loop turns."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from celery import bootsteps

#: How often the lease is renewed and the heartbeat file touched, in seconds.
INTERVAL_SECONDS = 2.0


class Lease(bootsteps.StartStopStep):
    """Keeps what this worker has taken from being delivered again while it works on it.

    kombu's Redis transport delivers a message again when it was taken longer ago than the visibility timeout, and
    never renews that. Renewed here, the timeout can be short, so that a dead worker's messages come back within
    seconds, and a fork of any length is delivered once. It leans on kombu's private `_delivered`
    (kombu/transport/virtual/base.py, QoS), which a test holds against the installed version; a renewal that is missed
    costs a second delivery, which does no harm.
    """

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def start(self, parent: Any) -> None:
        """Begin to renew."""
        self._timer = parent.timer.call_repeatedly(INTERVAL_SECONDS, self._renew, (parent,))

    def stop(self, parent: Any) -> None:
        """End it; without a connection there is nothing to renew."""
        self._timer.cancel()

    def _renew(self, parent: Any) -> None:
        channel = parent.task_consumer.channel
        now = time.time()
        taken = dict.fromkeys(list(channel.qos._delivered), now)
        if not taken:
            return
        try:
            with channel.conn_or_acquire() as client:
                client.zadd(channel.qos.unacked_index_key, taken, xx=True)
        except (*channel.connection_errors, OSError):
            return  # the consumer's loop meets the same, and reconnects


class Heartbeat(bootsteps.StartStopStep):
    """Touches a file, for a health check.

    `inspect ping` would be answered by a worker that no longer consumes, and costs half a second of CPU.
    """

    requires = ("celery.worker.consumer.tasks:Tasks",)
    #: Empty: none.
    path = ""

    def start(self, parent: Any) -> None:
        """Touch it now, and again and again."""
        if self.path:
            Path(self.path).touch()
            self._timer = parent.timer.call_repeatedly(INTERVAL_SECONDS, Path(self.path).touch)

    def stop(self, parent: Any) -> None:
        """Let it go stale."""
        if self.path:
            self._timer.cancel()
