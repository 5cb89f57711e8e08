"""The Celery app of a worker and of the command line: `celery -A worker.app worker -Q forkvm`."""

from __future__ import annotations

import socket
import sys
import uuid
from pathlib import Path
from typing import Any

from celery import Celery, bootsteps, signals

from tasks.app import inner_queues, register
from worker.settings import BadSettings, Settings, read_settings, roots_of

#: How often the heartbeat file is touched, in seconds.
_HEARTBEAT_SECONDS = 2.0


def make_app(settings: Settings) -> Celery:
    """The app for some settings; connects to nothing."""
    app = Celery("forkvm", broker=settings.broker_url, backend=settings.result_backend or settings.broker_url)
    app.conf.update(
        # JSON and nothing else, in both directions.
        task_serializer="json",
        result_serializer="json",
        accept_content=["json"],
        result_accept_content=["json"],
        task_default_queue=settings.queue,
        # A message is gone when its work is done, and a worker holds no more than it works on.
        task_acks_late=True,
        worker_prefetch_multiplier=1,
        # A child that died in the middle: its message goes back at once. The tries are counted in the staging
        # journal, so that what kills its worker each time comes to an end all the same (chunk.MAX_TRIES).
        task_reject_on_worker_lost=True,
        # Redis away for a while is no reason to lose what is done, to end, or to revoke what runs.
        result_backend_always_retry=True,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        broker_transport_options={
            "visibility_timeout": settings.visibility_timeout,
            "queue_order_strategy": "round_robin",
        },
        result_expires=settings.result_expires,
        # A net under leaks.
        worker_max_tasks_per_child=10_000,
        worker_hijack_root_logger=True,
        worker_send_task_events=False,
        timezone="UTC",
    )
    register(app, roots_of(settings), settings.limits, settings.result_expires)
    app.steps["consumer"].add(_heartbeat_step(settings.heartbeat_file))
    return app


def _heartbeat_step(path: str) -> type[bootsteps.StartStopStep]:
    """A step that touches a file for as long as the consumer's loop turns.

    `inspect ping` would be answered by a worker that no longer consumes, and costs half a second of CPU.
    """

    class Heartbeat(bootsteps.StartStopStep):
        requires = ("celery.worker.consumer.tasks:Tasks",)

        def start(self, parent: Any) -> None:
            if path:
                Path(path).touch()
                self.timer = parent.timer.call_repeatedly(_HEARTBEAT_SECONDS, Path(path).touch)

        def stop(self, parent: Any) -> None:
            if path:
                self.timer.cancel()

    return Heartbeat


def _settings() -> Settings:
    try:
        return read_settings()
    except BadSettings as error:
        sys.exit(f"forkvm: {error}")


@signals.celeryd_init.connect  # type: ignore[untyped-decorator]
def _name_the_node(instance: Any = None, **_: Any) -> None:
    """Give a worker that was not named a name of its own, so that several run on one host."""
    if instance is not None and instance.hostname == f"celery@{socket.gethostname()}":
        instance.hostname = f"forkvm-{uuid.uuid4().hex[:8]}@{socket.gethostname()}"


@signals.celeryd_init.connect  # type: ignore[untyped-decorator]
def _require_roots(conf: Any = None, **_: Any) -> None:
    if not _settings().roots:
        sys.exit("forkvm: no roots: set FORKVM_ROOTS to the directories that may be served, separated by colons")


@signals.celeryd_after_setup.connect  # type: ignore[untyped-decorator]
def _consume_inner_queues(instance: Any = None, **_: Any) -> None:
    """Consume the queues of chunks and finishes beside each domain's own."""
    queues = instance.app.amqp.queues
    for name in list(queues.consume_from):
        for inner in inner_queues(name):
            queues.select_add(inner)


app = make_app(_settings())
