"""Sending tasks, and the context that each running task sends them from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from celery import Celery
from redis.exceptions import OutOfMemoryError

from tasks.context import Context
from tasks.copier.copy_rate import Pace
from tasks.copier.options import Limits
from tasks.copier.roots import Roots
from tasks.delivery.backend import results_of
from tasks.delivery.canvas import take_canvas
from tasks.delivery.task_request import AnyTask, domain_queue, trace_headers
from tasks.names import inner_queue
from tasks.store.recent_forks.forks import RecentForks
from tasks.store.redis_errors import wait_out


def context_factory(app: Celery, roots: Roots, limits: Limits, pace: Pace) -> Callable[[AnyTask], Context]:
    """A function that makes the context of a running task. `pace` is the copy rate of this host."""
    ended = RecentForks()  # one for all tasks of a process: it remembers when it purged, and whether it warned

    def context_of(task: AnyTask) -> Context:
        queue, headers = domain_queue(task), trace_headers(task)

        def send(task: str, kwargs: dict[str, Any], task_id: str) -> None:
            send_patiently(app, task, kwargs, task_id, inner_queue(queue, task), headers=headers)

        canvas = take_canvas(task.request)
        return Context(roots, limits, results_of(app, patient=True), send, queue, canvas, ended, pace=pace)

    return context_of


def send_patiently(app: Celery, task: str, kwargs: dict[str, Any], task_id: str, queue: str, **options: Any) -> None:
    """Send a task. Waits while Redis is away, refuses writes, or is full."""
    wait_out(lambda: app.send_task(task, kwargs=kwargs, task_id=task_id, queue=queue, **options), OutOfMemoryError)


def send_once(app: Celery, task: str, kwargs: dict[str, Any], task_id: str, queue: str) -> None:
    """Send a task, with one try. Raises RedisError, OperationalError.

    It has a connection of its own: where Redis does not answer, kombu opens another channel and keeps the sockets of
    the first one until the connection is closed. A worker's main process would collect them in its connection pool.
    """
    with app.connection_for_write() as connection:
        app.send_task(task, kwargs=kwargs, task_id=task_id, queue=queue, retry=False, connection=connection)
