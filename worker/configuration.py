"""How Celery is set up: nothing but JSON, and nothing lost."""

from __future__ import annotations

from celery import Celery

from tasks.app import register, surroundings
from tasks.campaigns.app import register_campaigns
from worker.cpus import available_cpus
from worker.settings import Settings, roots_of
from worker.steps import Heartbeat, Lease, PutBack, Sweeper
from worker.tls import is_tls, tls_options
from worker.upgrade import Inheritance

#: Where kombu keeps the messages that were delivered and not acknowledged, of all domains; see `make_app`.
UNACKED_KEY = "forkvm:unacked"


def make_app(settings: Settings) -> Celery:
    """The app for some settings; connects to nothing."""
    backend = settings.result_backend or settings.broker_url
    app = Celery("forkvm", broker=settings.broker_url, backend=backend)
    app.conf.update(
        broker_use_ssl=tls_options(settings.redis_ca) if is_tls(settings.broker_url) else None,
        redis_backend_use_ssl=tls_options(settings.redis_ca) if is_tls(backend) else None,
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
    context = surroundings(app, roots_of(settings), settings.limits)
    register(app, context)
    register_campaigns(app, context)
    app.steps["consumer"] |= {
        Lease,
        PutBack,
        type("Inheritance", (Inheritance,), {"visibility_timeout": settings.visibility_timeout}),
        type("Heartbeat", (Heartbeat,), {"path": settings.heartbeat_file}),
        type("Sweeper", (Sweeper,), {"interval": settings.visibility_timeout}),
    }
    return app
