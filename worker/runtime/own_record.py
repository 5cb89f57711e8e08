"""The record that a worker keeps of itself in Redis, so that it is shown when it does not answer."""

from __future__ import annotations

import logging
import socket
import time
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from math import inf
from typing import Any

from celery import bootsteps
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError, ResponseError

from tasks.delivery.backend import results_of
from tasks.names import domain_of
from tasks.store.redis_errors import cause, is_passing
from tasks.store.workers import WorkerRecord
from worker.runtime.periodic_step import PeriodicStep

log = logging.getLogger(__name__)

#: celery-types does not declare the states of a blueprint.
_steps: Any = bootsteps

#: Interval in which the record is written, in seconds. That takes three commands; an idle worker may send three a
#: second.
INTERVAL_SECONDS = 10.0


def own_record(consumer: Any, *, ending: bool = False) -> WorkerRecord:
    """What the worker of this consumer says about itself."""
    return WorkerRecord(
        name=consumer.hostname,
        version=_version(),
        host=socket.gethostname(),
        queues=sorted({domain_of(queue) for queue in consumer.app.amqp.queues.consume_from}),
        children=_children(consumer.pool),
        ending=ending,
    )


def _children(pool: Any) -> int:
    try:
        return len(pool.info.get("processes", []))
    except AttributeError:  # Celery has terminated it (SIGQUIT)
        return 0


def _remove_mailboxes(consumer: Any, names: list[str]) -> None:
    """Remove kombu's bindings of the mailboxes of workers that were killed. Raises RedisError, OSError.

    kombu removes them only when no worker of the Redis database is left.
    """
    channel, exchange = consumer.task_consumer.channel, f"{consumer.app.conf.control_exchange}.pidbox"
    bindings = [channel.sep.join(("", "", f"{name}.{exchange}")) for name in names]
    if bindings:
        with channel.conn_or_acquire() as client:
            client.srem(channel.keyprefix_queue % exchange, *bindings)


@cache
def _version() -> str:
    """The version that this process runs. The installation on disk may be replaced meanwhile."""
    return version("forkvm")


class OwnRecord(PeriodicStep):
    """Writes this worker's record, and removes it when the worker ends.

    A worker that hangs, was killed, or whose host is gone answers no question. Its last record shows that it is missing
    (`worker.overview`). The consumer loop writes it, so that a worker whose loop hangs is shown too. A worker that
    finishes its running tasks after SIGTERM does not answer either, and its last record says so.
    """

    #: Control: a worker answers questions when it has a record.
    requires = ("celery.worker.consumer.tasks:Tasks", "celery.worker.consumer.control:Control")

    _has_started = False
    _has_warned = False
    #: When the record could not be written last, by time.monotonic().
    _failed_at = -inf

    def start(self, parent: Any) -> None:
        """Write the record now and in each interval."""
        if not self._has_started:
            self._has_started = True
            with suppress(OperationalError, RedisError, OSError):
                old = results_of(parent.app, patient=False).workers.remove_old()
                _remove_mailboxes(parent, old)
        self._write(own_record(parent), parent.app)
        self.repeat(parent, INTERVAL_SECONDS, lambda: self._write(own_record(parent), parent.app))

    def stop(self, parent: Any) -> None:
        """Stop it; called when the connection is lost, and when the worker is told to end."""
        super().stop(parent)
        if self._has_started and parent.blueprint.state == _steps.CLOSE:
            self._write(own_record(parent, ending=True), parent.app)

    def shutdown(self, parent: Any) -> None:
        """Remove the record; called when the worker has finished its tasks.

        A Redis that did not answer just now is not asked again: each question takes until the timeout.
        """
        if self._has_started and time.monotonic() - self._failed_at > INTERVAL_SECONDS:
            with suppress(OperationalError, RedisError, OSError):
                results_of(parent.app, patient=False).workers.remove(parent.hostname)

    def _write(self, record: WorkerRecord, app: Any) -> None:
        """Write the record. Celery would take a raised error for a lost connection to the broker."""
        try:
            results_of(app, patient=False).workers.keep(record)  # not patient: the consumer loop waits for this call
            self._has_warned = False
        except (OperationalError, RedisError, OSError) as error:
            self._failed_at = time.monotonic()
            # An error of the connection needs no line of its own: the consumer loop gets the same one and reconnects.
            if isinstance(error, ResponseError) and not is_passing(error) and not self._has_warned:
                self._has_warned = True
                log.warning(
                    "the record of this worker was not written: %s; the worker continues, but forkvm queues will not "
                    "show it if it does not answer",
                    cause(error),
                )
