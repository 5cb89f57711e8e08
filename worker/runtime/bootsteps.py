"""What a worker does next to its tasks, while it is connected to Redis: leases, heartbeat, sweeps."""

from __future__ import annotations

import gc
import logging
import time
from contextlib import suppress
from math import inf
from pathlib import Path
from typing import Any

from celery import bootsteps
from celery.utils import uuid
from celery.worker import state
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError, ResponseError

from tasks.copier.kernel.processes import is_stopped
from tasks.delivery.backend import results_of
from tasks.delivery.sending import send_once
from tasks.names import SWEEP_TASK, inner_queue
from tasks.store import keys
from tasks.store.redis_errors import is_passing
from tasks.sweep import is_sweep_needed
from worker.runtime.patches import restore_unrecorded
from worker.runtime.periodic_step import PeriodicStep

log = logging.getLogger(__name__)

#: Interval in which leases are renewed and the heartbeat file is touched, in seconds.
INTERVAL_SECONDS = 2.0
#: A sweep that has not ended after this number of intervals counts as lost, and another one is sent.
_SWEEP_LOST_INTERVALS = 3


class CollectConnections(bootsteps.StartStopStep):
    """Closes the sockets of the connection that was lost.

    kombu's connections and channels refer to each other. So what is left of one is closed by a garbage collection, and
    a process that waits for messages allocates too little to have one.
    """

    requires = ("celery.worker.consumer.connection:Connection",)

    def start(self, parent: Any) -> None:
        """Collect; called when the worker has connected. The objects of the program are left out (`worker.app`)."""
        gc.collect()


class RestoreMessages(bootsteps.StartStopStep):
    """Returns messages to their queues that were taken when Redis went away; see `patches.patch_unacked_messages`."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def start(self, parent: Any) -> None:
        """Return them; called when the worker has connected."""
        restore_unrecorded(parent.task_consumer.channel)


class Lease(PeriodicStep):
    """Renews the lease of each message that this worker has taken, so that it is not redelivered meanwhile.

    kombu's Redis transport redelivers a message when the visibility timeout has passed since it was taken, and has no
    renewal. With renewal the timeout can be short: a dead worker's messages are redelivered within seconds, and a fork
    of any length is delivered once. A missed renewal causes a second delivery, which is harmless. The code reads
    kombu's private `_delivered` and `_dirty` (kombu/transport/virtual/base.py, QoS); a test checks it on the installed
    version.

    The messages of a stopped child process (SIGSTOP, a debugger) are not renewed: they are redelivered, and another
    process takes the fork over.
    """

    requires = ("celery.worker.consumer.tasks:Tasks",)
    #: When a worker of this process renewed its leases last, by time.monotonic().
    renewed_at = -inf

    def start(self, parent: Any) -> None:
        """Start to renew."""
        Lease.renewed_at = time.monotonic()
        self.repeat(parent, INTERVAL_SECONDS, self._renew, parent)

    def _renew(self, parent: Any) -> None:
        channel = parent.task_consumer.channel
        now = time.time()
        stopped = _tags_of_stopped_children(parent.pool.info.get("processes", []))
        done = channel.qos._dirty  # acknowledged; kombu forgets them with the next message
        taken = dict.fromkeys((tag for tag in list(channel.qos._delivered) if tag not in stopped | done), now)
        Lease.renewed_at = time.monotonic()
        if not taken:
            return
        try:
            with channel.conn_or_acquire() as client:
                client.zadd(channel.qos.unacked_index_key, taken, xx=True)
        except ResponseError as error:  # an error of the connection is raised: the worker connects again
            if not is_passing(error):
                raise  # a passing error: the next renewal is in time


def _tags_of_stopped_children(children: list[int]) -> set[str]:
    """The delivery tags of messages that a stopped child process has, or may have been sent."""
    stopped = {pid for pid in children if is_stopped(pid)}
    if not stopped:
        return set()
    return {
        request.message.delivery_tag
        for request in list(state.reserved_requests)
        if request.worker_pid is None or request.worker_pid in stopped
    }


class Heartbeat(PeriodicStep):
    """Touches a file for a health check.

    Celery's `inspect ping` is no substitute: a worker that no longer consumes answers it, and it costs 0.5 s of CPU.
    """

    requires = ("celery.worker.consumer.tasks:Tasks",)
    #: Path of the file; empty for no heartbeat.
    path = ""

    def start(self, parent: Any) -> None:
        """Touch it now and in each interval."""
        if self.path:
            self._has_warned = False
            self._touch()
            self.repeat(parent, INTERVAL_SECONDS, self._touch)

    def _touch(self) -> None:
        """Touch the file; an error is logged. Celery would take a raised OSError for a lost connection to Redis."""
        try:
            Path(self.path).touch()
            self._has_warned = False
        except OSError as error:
            if not self._has_warned:
                log.warning(
                    "the heartbeat file %s cannot be written: %s; the worker continues", self.path, error.strerror
                )
            self._has_warned = True


class Sweeper(PeriodicStep):
    """Sends the sweep task in each interval, which one of the domain's workers runs; see `tasks.sweep`."""

    requires = ("celery.worker.consumer.tasks:Tasks",)
    #: Seconds between two sweeps. A dead worker's messages are redelivered by then: a job without a message is lost.
    interval = 10

    def start(self, parent: Any) -> None:
        """Start to send sweeps."""
        self.repeat(parent, self.interval, self._send, parent.app)

    def _send(self, app: Any) -> None:
        # Not patient: the consumer loop waits for this call.
        results = results_of(app, patient=False)
        queues = [name for name in app.amqp.queues.consume_from if "#" not in name]
        with suppress(OperationalError, RedisError, OSError):  # the consumer loop gets the same error and reconnects
            for queue in queues:
                lost_after = _SWEEP_LOST_INTERVALS * self.interval
                if is_sweep_needed(results, queue) and results.periodic_work.start(keys.SWEEP, queue, lost_after):
                    arguments = {"every": self.interval}
                    send_once(app, SWEEP_TASK, arguments, uuid(), inner_queue(queue, SWEEP_TASK))
