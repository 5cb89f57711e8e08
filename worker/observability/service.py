"""Puts the parts together: what a worker shows of itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tasks import events
from worker.observability.fallbacks import FallbackLog
from worker.observability.reports import Pipe, Report
from worker.settings import Settings


def observe(app: Any, settings: Settings) -> Callable[[], None]:
    """Let all processes of this worker report. Call it before the pool processes are forked.

    Returns a function that starts to read the reports and to answer requests, to be called once logging is set up.
    Raises OSError if FORKVM_HTTP cannot be used.
    """
    pipe = Pipe(counts=settings.http is not None)
    events.install(pipe.reporter)
    takers: list[Callable[[Report], None]] = [FallbackLog().take]
    starts: list[Callable[[], None]] = [lambda: pipe.start(takers)]
    if settings.http is not None:
        from worker.observability.endpoint import Endpoint  # prometheus_client takes 50 ms to import

        endpoint = Endpoint(app, *settings.http, settings.roots)
        takers.append(endpoint.take)
        starts.append(endpoint.start)

    def start() -> None:
        for each in starts:
            each()

    return start
