"""The Celery app of a worker: the tasks, and what runs beside them."""

from __future__ import annotations

import os
from functools import partial

from celery import Celery

from tasks.campaign.tasks import register_campaigns
from tasks.copier.roots import Roots
from tasks.delivery.sending import context_factory
from tasks.fork.tasks import register_forks
from worker.observability.tracing import has_traces
from worker.runtime.bootsteps import CollectConnections, Heartbeat, Lease, RestoreMessages, Sweeper
from worker.runtime.configuration import make_app
from worker.runtime.earlier_versions import RestoreEarlierMessages
from worker.runtime.message_filter import plain_fork
from worker.runtime.own_record import OwnRecord
from worker.settings import Settings


def make_worker_app(settings: Settings) -> Celery:
    """The Celery app of a worker with these `settings`. It connects to nothing."""
    app = make_app(settings)
    context_of = context_factory(app, Roots(settings.roots), settings.limits, settings.copy_pace)
    register_forks(app, context_of, partial(plain_fork, app.tasks, has_traces(os.environ)))
    register_campaigns(app, context_of)
    app.steps["consumer"] |= {
        CollectConnections,
        Lease,
        OwnRecord,
        RestoreMessages,
        type("RestoreEarlierMessages", (RestoreEarlierMessages,), {"visibility_timeout": settings.visibility_timeout}),
        type("Heartbeat", (Heartbeat,), {"path": settings.heartbeat_file}),
        type("Sweeper", (Sweeper,), {"interval": settings.visibility_timeout}),
    }
    return app
