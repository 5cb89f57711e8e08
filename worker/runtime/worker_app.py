"""The Celery app of a worker: the tasks, and what runs beside them."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

from celery import Celery
from kombu import Connection

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

#: The pause between two tries to reach Redis, in seconds.
_RECONNECT_SECONDS = 2


class BrokerConnection(Connection):
    """A connection to the broker that is opened again as soon as Redis is back.

    kombu waits two seconds longer after each try, up to 32: after a few minutes without Redis, a worker would serve
    nothing for half a minute more.
    """

    def ensure_connection(self, *args: Any, **options: Any) -> Any:
        """Connect; called by Celery's consumer."""
        pauses = {"interval_start": _RECONNECT_SECONDS, "interval_step": 0}
        return super().ensure_connection(*args, **(pauses | options))


def make_worker_app(settings: Settings) -> Celery:
    """The Celery app of a worker with these `settings`. It connects to nothing."""
    app = make_app(settings)
    app.amqp.Connection = BrokerConnection
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
