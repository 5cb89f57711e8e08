"""Puts the parts together: what a worker shows of itself."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

from tasks import events
from worker.observability.fallbacks import FallbackLog
from worker.observability.reports import Pipe, Report
from worker.observability.tracing import Tracing, are_traces_wanted, has_traces, tracer_from_environment
from worker.settings import Settings

log = logging.getLogger(__name__)


def observe(app: Any, settings: Settings) -> Callable[[], None]:
    """Let all processes of this worker report. Call it before the pool processes are forked.

    Returns a function that starts to read the reports and to answer requests, to be called once logging is set up and
    the pool processes are forked.
    Raises OSError if FORKVM_HTTP cannot be used.
    """
    spans = has_traces(os.environ)
    pipe = Pipe(counts=settings.http is not None, spans=spans)
    events.install(pipe.reporter)
    takers: list[Callable[[Report], None]] = [FallbackLog().take]
    if spans:
        takers.append(Tracing(tracer_from_environment).take)
    starts: list[Callable[[], None]] = [lambda: pipe.start(takers)]
    if settings.http is not None:
        from worker.observability.endpoint import Endpoint  # prometheus_client takes 50 ms to import

        endpoint = Endpoint(app, *settings.http, settings.roots)
        takers.append(endpoint.take)
        starts.append(endpoint.start)

    def start() -> None:
        if are_traces_wanted(os.environ) and not spans:
            log.warning("no traces are sent: the extra forkvm[otel] is not installed")
        for each in starts:
            each()

    return start
