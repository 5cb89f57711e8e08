"""The Celery app: built from the settings alone, JSON only, and configured so that no accepted task is lost.

It is the app of the commands, which send tasks by name. `worker.runtime.worker_app` adds what a worker needs.
"""

from __future__ import annotations

from typing import Any

from celery import Celery

from tasks.delivery.backend import BACKENDS
from tasks.delivery.canvas import route
from worker.cpus import available_cpus
from worker.environment import remove_celery_variables
from worker.redis_url import SENTINEL, RedisUrl
from worker.runtime.timeouts import broker_timeouts, result_timeouts
from worker.settings import Settings
from worker.tls import tls_options

#: Hash in which kombu keeps the unacknowledged messages of all domains.
UNACKED_KEY = "forkvm:unacked"

#: Celery's default for an app. Named here because Celery would otherwise read CELERY_LOADER.
_LOADER = "celery.loaders.app:AppLoader"
#: If a sentinel does not answer within this time, in seconds, the next one is asked.
_SENTINEL_SECONDS = 2.0


def make_app(settings: Settings) -> Celery:
    """The Celery app for `settings`, without tasks. It connects to nothing.

    Celery's own environment variables are removed from this process first: only the settings count.
    """
    remove_celery_variables()
    app = Celery(
        "forkvm",
        broker=settings.broker.render(settings.redis_password),
        backend=settings.backend.render(settings.redis_password),
        loader=_LOADER,
        fixups=[],  # the default fixup reads the settings of a Django application
    )
    app.loader.override_backends = BACKENDS
    app.conf.update(_message_options(settings) | _process_options(settings) | _connection_options(settings))
    return app


def _message_options(settings: Settings) -> dict[str, Any]:
    """What messages and results hold, where they go, and when they are acknowledged."""
    return {
        "task_serializer": "json",
        "result_serializer": "json",
        "accept_content": ["json"],
        "result_accept_content": ["json"],
        "task_default_queue": settings.queue,
        "task_routes": [route],
        # A message is acknowledged when its task is done. A worker takes one message for each pool process.
        "task_acks_late": True,
        "worker_prefetch_multiplier": 1,
        # The message of a pool process that died goes back to its queue at once. The staging journal counts the tries,
        # so a task that kills its process each time is given up in the end.
        "task_reject_on_worker_lost": True,
        "result_expires": settings.result_expires,
        "worker_send_task_events": False,
        "timezone": "UTC",
    }


def _process_options(settings: Settings) -> dict[str, Any]:
    """The pool processes and their limits."""
    return {
        "worker_concurrency": settings.concurrency or available_cpus(),
        # Without a limit, the lease of a task that hangs would be renewed endlessly. A killed process counts as lost.
        "task_time_limit": settings.task_time_limit,
        # Bounds the effect of memory leaks.
        "worker_max_tasks_per_child": 10_000,
        "worker_hijack_root_logger": True,
    }


def _connection_options(settings: Settings) -> dict[str, Any]:
    """The connections to Redis. A Redis that is away or full is waited for: no result is dropped, no task cancelled."""
    return {
        "broker_use_ssl": tls_options(settings.broker, settings.redis_ca),
        "redis_backend_use_ssl": tls_options(settings.backend, settings.redis_ca),
        "broker_transport_options": _transport_options(settings),
        "result_backend_transport_options": _sentinel_options(settings.backend, settings),
        **result_timeouts(),
        "result_backend_always_retry": True,
        "task_publish_retry_policy": {
            "max_retries": None,
            "interval_start": 0,
            "interval_step": 0.2,
            "interval_max": 1,
        },
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,
        "broker_channel_error_retry": True,  # a full Redis answers a worker that connects again with such an error
        "worker_cancel_long_running_tasks_on_connection_loss": False,
    }


def _transport_options(settings: Settings) -> dict[str, Any]:
    """The options of kombu's Redis transport."""
    return {
        # Keys of our own instead of kombu's defaults, which all Celery applications of a Redis database share: with
        # our short visibility timeout, their messages would be delivered twice. No queue can have these names.
        "unacked_key": UNACKED_KEY,
        "unacked_index_key": f"{UNACKED_KEY}_index",
        "unacked_mutex_key": f"{UNACKED_KEY}_mutex",
        **_sentinel_options(settings.broker, settings),
        **broker_timeouts(),
        "visibility_timeout": settings.visibility_timeout,  # renewed by bootsteps.Lease
        "unacked_restore_interval": 2,
        "unacked_restore_throttle": 1,
        # Redelivery is guarded by a kombu lock. If its holder dies, the others wait 3 s instead of kombu's 300 s. Two
        # holders at once are harmless, because a message is moved in one step.
        "unacked_mutex_expire": 3,
        "queue_order_strategy": "round_robin",
    }


def _sentinel_options(url: RedisUrl, settings: Settings) -> dict[str, Any]:
    """The options that kombu and Celery need for a `sentinel://` URL; none for other URLs."""
    if url.scheme != SENTINEL:
        return {}
    password = {"password": settings.sentinel_password} if settings.sentinel_password else {}
    return {
        "master_name": url.master or settings.sentinel_master,
        "sentinel_kwargs": {
            "socket_timeout": _SENTINEL_SECONDS,
            "socket_connect_timeout": _SENTINEL_SECONDS,
            **password,
        },
    }
