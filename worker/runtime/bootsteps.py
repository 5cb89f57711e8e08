"""What a worker does beside its tasks, for as long as its consumer's loop turns."""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from celery import bootsteps
from celery.worker import state
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError, ResponseError

from tasks.copier.kernel.processes import is_stopped
from tasks.delivery.backend import results_of
from tasks.names import SWEEP_TASK, inner_queue
from tasks.store import keys
from tasks.store.redis_errors import is_passing
from worker.runtime.patches import put_unnoted_back

log = logging.getLogger(__name__)

#: How often the lease is renewed and the heartbeat file touched, in seconds.
INTERVAL_SECONDS = 2.0
#: A sweep that is not over after so many intervals is taken for lost, and another one is sent.
_SWEEP_LOST_INTERVALS = 3


class PutBack(bootsteps.StartStopStep):
    """Puts what was taken when Redis went away back into its queue; see `mending.patch_unacknowledged_messages`."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def start(self, parent: Any) -> None:
        """Redis is back."""
        put_unnoted_back(parent.task_consumer.channel)


class Lease(bootsteps.StartStopStep):
    """Keeps what this worker has taken from being delivered again while it works on it.

    kombu's Redis transport delivers a message again when it was taken longer ago than the visibility timeout, and
    never renews that. Renewed here, the timeout can be short, so that a dead worker's messages come back within
    seconds, and a fork of any length is delivered once. It leans on kombu's private `_delivered`
    (kombu/transport/virtual/base.py, QoS), which a test holds against the installed version; a renewal that is missed
    costs a second delivery, which does no harm.

    What a stopped child has (SIGSTOP, a debugger) is not renewed: it is delivered again, and another
    process takes the fork over.
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
        held_up = _held_up(parent.pool.info.get("processes", []))
        taken = dict.fromkeys((tag for tag in list(channel.qos._delivered) if tag not in held_up), now)
        if not taken:
            return
        try:
            with channel.conn_or_acquire() as client:
                client.zadd(channel.qos.unacked_index_key, taken, xx=True)
        except (*channel.connection_errors, OSError):
            return  # the consumer's loop meets the same, and reconnects
        except ResponseError as error:
            if not is_passing(error):
                raise  # the next renewal comes in time


def _held_up(children: list[int]) -> set[str]:
    """The delivery tags of what a stopped child has, or may have been given before it took it up."""
    stopped = {pid for pid in children if is_stopped(pid)}
    if not stopped:
        return set()
    return {
        request.message.delivery_tag
        for request in list(state.reserved_requests)
        if request.worker_pid is None or request.worker_pid in stopped
    }


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
            self._has_warned = False
            self._touch()
            self._timer = parent.timer.call_repeatedly(INTERVAL_SECONDS, self._touch)

    def stop(self, parent: Any) -> None:
        """Let it go stale."""
        if self.path:
            self._timer.cancel()

    def _touch(self) -> None:
        """An error here is none of the connection to Redis, for which Celery would take any OSError."""
        try:
            Path(self.path).touch()
            self._has_warned = False
        except OSError as error:
            if not self._has_warned:
                log.warning("the heartbeat file %s cannot be written: %s; serving goes on", self.path, error.strerror)
            self._has_warned = True


class Sweeper(bootsteps.StartStopStep):
    """Has one of a domain's workers look, again and again, after what stands still; see `tasks.sweep`."""

    requires = ("celery.worker.consumer.tasks:Tasks",)
    #: Seconds between two sweeps: a dead worker's messages are delivered again by then, so what stands still is lost.
    interval = 10

    def start(self, parent: Any) -> None:
        """Begin to send sweeps."""
        self._timer = parent.timer.call_repeatedly(self.interval, self._send, (parent.app,))

    def stop(self, parent: Any) -> None:
        """End it."""
        self._timer.cancel()

    def _send(self, app: Any) -> None:
        # One try each: the consumer's loop waits for this.
        results = results_of(app, patient=False)
        queues = [name for name in app.amqp.queues.consume_from if "#" not in name]
        with suppress(OperationalError, RedisError, OSError):  # the consumer's loop meets the same, and reconnects
            for queue in queues:
                if results.periodic_work.start(keys.SWEEP, queue, _SWEEP_LOST_INTERVALS * self.interval):
                    queue = inner_queue(queue, SWEEP_TASK)
                    app.send_task(SWEEP_TASK, kwargs={"every": self.interval}, queue=queue, retry=False)
