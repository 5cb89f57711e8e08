"""Traces, with the extra `forkvm[otel]`: one span for each fork and campaign, and one for each of its phases.

A job belongs to the trace that its client names in the message header `traceparent`. The spans are made in the main
process when the job has ended, from the times in its result: its phases may have run in several processes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING

from worker.observability.reports import Repetitions, Report

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

#: Where the spans are sent to. OpenTelemetry's own variables, which its exporter reads with many others.
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
#: The phases of a job, in their order. `queued` ends when work begins.
_PHASES = ("queued", "plan", "copy", "publish")


def are_traces_wanted(environment: Mapping[str, str]) -> bool:
    """Whether spans are to be sent somewhere."""
    return any(environment.get(name) for name in _ENDPOINTS) and environment.get("OTEL_SDK_DISABLED") != "true"


def can_trace() -> bool:
    """Whether the extra is installed."""
    try:
        return find_spec("opentelemetry.exporter.otlp.proto.http") is not None
    except ModuleNotFoundError:
        return False


def has_traces(environment: Mapping[str, str]) -> bool:
    """Whether this worker sends spans."""
    return are_traces_wanted(environment) and can_trace()


def tracer_from_environment() -> Tracer:
    """A tracer that sends its spans over OTLP, in a thread of its own."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    name = {} if "OTEL_SERVICE_NAME" in os.environ else {"service.name": "forkvm"}
    provider = TracerProvider(resource=Resource.create({**name, "service.version": version("forkvm")}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider.get_tracer("forkvm")


class Tracing:
    """Makes the spans of the jobs that have ended."""

    def __init__(self, make_tracer: Callable[[], Tracer]) -> None:
        """`make_tracer` is called before the first span."""
        self._make_tracer = make_tracer
        self._tracer: Tracer | None = None
        self._repetitions = Repetitions()

    def take(self, report: Report) -> None:
        """Take a report of one of the worker's processes."""
        kind, *values = report
        if kind == "span":
            self._trace(*values)

    def _trace(
        self, job: str, job_id: str, status: str, code: str, parent: str, started: float, seconds: dict[str, float]
    ) -> None:
        from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        if self._repetitions.has_seen(job_id, str(started)):
            return
        tracer = self._tracer = self._tracer or self._make_tracer()
        moment = started - seconds["queued"]
        span = tracer.start_span(
            f"forkvm.{job}",
            TraceContextTextMapPropagator().extract({"traceparent": parent}),
            SpanKind.CONSUMER,
            {f"forkvm.{job}_id": job_id, "forkvm.status": status, **({"forkvm.code": code} if code else {})},
            start_time=_nanoseconds(moment),
        )
        for phase in _PHASES:
            if phase in seconds:
                part = tracer.start_span(phase, set_span_in_context(span), start_time=_nanoseconds(moment))
                moment += seconds[phase]
                part.end(_nanoseconds(moment))
        if code:
            span.set_status(StatusCode.ERROR, code)
        span.end(_nanoseconds(max(moment, started + seconds["total"])))


def _nanoseconds(moment: float) -> int:
    return int(moment * 1e9)
