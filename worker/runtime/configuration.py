"""How Celery is set up: nothing but JSON, and nothing lost."""

from __future__ import annotations

from typing import Any

from celery import Celery

from tasks.campaign.tasks import register_campaigns
from tasks.delivery.backend import BACKENDS
from tasks.delivery.canvas import route
from tasks.delivery.sending import context_factory
from tasks.fork.tasks import register_forks
from worker.cpus import available_cpus
from worker.environment import remove_celery_variables
from worker.redis_url import SENTINEL, RedisUrl
from worker.runtime.bootsteps import Heartbeat, Lease, PutBack, Sweeper
from worker.runtime.earlier_versions import Inheritance
from worker.runtime.timeouts import broker_bounds, result_bounds
from worker.settings import Settings, roots_of
from worker.tls import tls_options

#: Where kombu keeps the messages that were delivered and not acknowledged, of all domains; see `make_app`.
UNACKED_KEY = "forkvm:unacked"

#: Celery's own for an app; named, or CELERY_LOADER would be asked.
_LOADER = "celery.loaders.app:AppLoader"
#: A sentinel that does not answer for so long is passed over for the next.
_SENTINEL_SECONDS = 2.0


def make_app(settings: Settings) -> Celery:
    """The app for some settings, which alone decide: Celery's own variables leave this process's environment.

    Connects to nothing.
    """
    remove_celery_variables()
    broker, backend = settings.broker, settings.backend
    app = Celery(
        "forkvm",
        broker=broker.render(settings.redis_password),
        backend=backend.render(settings.redis_password),
        loader=_LOADER,
        fixups=[],  # Celery's own is for Django: it would read another application's settings
    )
    app.loader.override_backends = BACKENDS
    app.conf.update(
        broker_use_ssl=tls_options(broker, settings.redis_ca),
        redis_backend_use_ssl=tls_options(backend, settings.redis_ca),
        result_backend_transport_options=_sentinel_options(backend, settings),
        **result_bounds(),
        # JSON and nothing else, in both directions.
        task_serializer="json",
        result_serializer="json",
        accept_content=["json"],
        result_accept_content=["json"],
        task_default_queue=settings.queue,
        task_routes=[route],
        # A message is gone when its work is done, and a worker holds no more than it works on.
        task_acks_late=True,
        worker_prefetch_multiplier=1,
        # A child that died in the middle: its message goes back at once. The tries are counted in the staging
        # journal, so that what kills its worker each time comes to an end all the same (chunk.MAX_TRIES).
        task_reject_on_worker_lost=True,
        # Redis away or full for a while is no reason to lose what is done, to end, or to revoke what runs.
        result_backend_always_retry=True,
        task_publish_retry_policy={"max_retries": None, "interval_start": 0, "interval_step": 0.2, "interval_max": 1},
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_channel_error_retry=True,  # what a full Redis answers to a worker that connects again
        worker_cancel_long_running_tasks_on_connection_loss=False,
        broker_transport_options={
            # Not kombu's own keys: all Celery applications of a Redis database share those, and a short visibility
            # timeout would deliver the other applications' messages again. No queue can have such a name.
            "unacked_key": UNACKED_KEY,
            "unacked_index_key": f"{UNACKED_KEY}_index",
            "unacked_mutex_key": f"{UNACKED_KEY}_mutex",
            **_sentinel_options(broker, settings),
            **broker_bounds(),
            "visibility_timeout": settings.visibility_timeout,  # renewed by steps.Lease
            "unacked_restore_interval": 2,
            "unacked_restore_throttle": 1,
            # Who puts messages back holds a lock for it, and may die, or lose its connection, with it: kombu's own 300
            # s would keep all workers from it for so long. Two at once do no harm: a message is moved in one step.
            "unacked_mutex_expire": 3,
            "queue_order_strategy": "round_robin",
        },
        result_expires=settings.result_expires,
        # A net under what hangs: its lease would be renewed for ever. Killed, it counts as a process that was lost.
        task_time_limit=settings.task_time_limit,
        worker_concurrency=settings.concurrency or available_cpus(),
        # A net under leaks.
        worker_max_tasks_per_child=10_000,
        worker_hijack_root_logger=True,
        worker_send_task_events=False,
        timezone="UTC",
    )
    context_of = context_factory(app, roots_of(settings), settings.limits)
    register_forks(app, context_of)
    register_campaigns(app, context_of)
    app.steps["consumer"] |= {
        Lease,
        PutBack,
        type("Inheritance", (Inheritance,), {"visibility_timeout": settings.visibility_timeout}),
        type("Heartbeat", (Heartbeat,), {"path": settings.heartbeat_file}),
        type("Sweeper", (Sweeper,), {"interval": settings.visibility_timeout}),
    }
    return app


def _sentinel_options(url: RedisUrl, settings: Settings) -> dict[str, Any]:
    """What kombu and Celery take beside a `sentinel://` URL; nothing for any other."""
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
