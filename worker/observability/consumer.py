"""What the main process knows of itself: whether its consumer loop turns, whether it is connected, what its pool does.

The consumer loop writes it, between its other work; requests read it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from celery import bootsteps, signals
from celery.worker import state
from celery.worker.consumer import consumer as celery_consumer

from tasks.delivery.message import Message
from tasks.names import is_part_of_job

#: celery-types does not declare the states of a blueprint.
_steps: Any = bootsteps

#: How often the loop writes, in seconds.
_INTERVAL_SECONDS = 2.0


@dataclass(eq=False)
class Consumer:
    """The state of the consumer loop and of the pool."""

    #: When the loop turned last, by time.monotonic().
    turned_at: float = field(default_factory=time.monotonic)
    is_connected: bool = False
    #: Whether the worker was asked to end. Then the loop turns no more, while running tasks end.
    is_stopping: bool = False
    children: int = 0
    children_busy: int = 0
    #: The forks and campaigns that the children work on.
    jobs: int = 0

    def turn(self) -> None:
        """Note that the loop turns."""
        self.turned_at = time.monotonic()

    def read_pool(self, pool: Any) -> None:
        """Read what the pool does."""
        active = list(state.active_requests)
        self.children = len(pool.info.get("processes", []))
        self.children_busy = len(active)
        parts = [request for request in active if isinstance(request, Message) and is_part_of_job(str(request.name))]
        self.jobs = len({request.job_id for request in parts})


def observe_consumer(app: Any) -> Consumer:
    """The state of the consumer loop of `app`, from its next start on."""
    consumer = Consumer()
    app.steps["consumer"].add(type("Turns", (_Turns,), {"consumer": consumer}))
    _count_waiting_as_turning(consumer)

    def stop(**_: Any) -> None:
        consumer.is_stopping = True

    signals.worker_shutting_down.connect(stop, weak=False)
    return consumer


class _Turns(bootsteps.StartStopStep):
    """Notes each turn of the loop while it is connected to Redis."""

    requires = ("celery.worker.consumer.tasks:Tasks",)
    consumer: Consumer
    #: None until the worker has connected; Celery also stops a step that it has not started.
    _timer: Any = None

    def start(self, parent: Any) -> None:
        """Called when the worker has connected."""
        self.consumer.is_connected = True
        self._note(parent)
        self._timer = parent.timer.call_repeatedly(_INTERVAL_SECONDS, self._note, (parent,))

    def stop(self, parent: Any) -> None:
        """Called when the connection is lost. The steps that stop next wait for a Redis that hangs.

        Also called when the worker ends. On SIGHUP, Celery sends no signal of it.
        """
        self.consumer.is_connected = False
        self.consumer.is_stopping = self.consumer.is_stopping or parent.blueprint.state == _steps.CLOSE
        self.consumer.turn()
        if self._timer is not None:
            self._timer.cancel()

    def _note(self, parent: Any) -> None:
        self.consumer.turn()
        self.consumer.read_pool(parent.pool)


@cache  # once a process
def _count_waiting_as_turning(consumer: Consumer) -> None:
    """Let a loop that waits for Redis turn: Celery then calls `maybe_shutdown` each second, and runs no timer."""
    module: Any = celery_consumer
    maybe_shutdown = module.maybe_shutdown

    def turn() -> None:
        consumer.turn()
        maybe_shutdown()

    module.maybe_shutdown = turn
