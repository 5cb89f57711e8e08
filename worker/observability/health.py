"""Whether a worker is alive, and whether it is ready for messages.

A worker without Redis is alive: to restart it would not bring Redis back. It is not ready.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from worker.observability.consumer import Consumer
from worker.observability.gauges import RedisValues, RootValues
from worker.observability.readings import Reading

#: A consumer loop that has not turned for so long hangs, in seconds. It turns every 2 s.
_STUCK_SECONDS = 30.0


@dataclass(frozen=True)
class Health:
    """The answers to the two probes: a list of what is wrong, empty if nothing is."""

    consumer: Consumer
    redis: Reading[RedisValues]
    roots: dict[str, Reading[RootValues]]

    def why_not_alive(self) -> list[str]:
        """Why the worker should be restarted. A worker that ends is alive: its running tasks are finished first."""
        silent = time.monotonic() - self.consumer.turned_at
        if self.consumer.is_stopping or silent <= _STUCK_SECONDS:
            return []
        return [f"the consumer loop has not turned for {silent:.0f} s"]

    def why_not_ready(self) -> list[str]:
        """Why the worker should not be counted on for messages."""
        found = self.why_not_alive()
        if self.consumer.is_stopping:
            found.append("the worker is ending")
        if not self.consumer.is_connected:
            found.append("not connected to Redis")
        elif self.redis.value() is None:
            found.append("Redis does not answer")
        for root, reading in self.roots.items():
            values = reading.value()
            if values is None:
                found.append(f"root {root}: missing, or does not answer")
            elif not values.is_writable:
                found.append(f"root {root}: not writable")
        return found
