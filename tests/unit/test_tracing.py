"""Spans of forks and campaigns, in an exporter that stores them in memory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from tasks.copier.campaign.spec import Aims, CampaignSpec, campaign_result
from tasks.copier.errors import Code, ForkError
from tasks.copier.fork_spec import Clock, ForkSpec, failed, succeeded
from tasks.copier.report import Totals
from tasks.delivery.task_request import trace_headers
from worker.observability.reports import Pipe
from worker.observability.tracing import Tracing, are_traces_wanted

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
SPAN = [
    "span",
    "fork",
    "f",
    "succeeded",
    "",
    PARENT,
    1000.0,
    {"queued": 1, "plan": 2, "copy": 3, "publish": 4, "total": 9},
]


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracing(exporter: InMemorySpanExporter) -> Tracing:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return Tracing(lambda: provider.get_tracer("test"))


def _seconds(span: ReadableSpan) -> tuple[float, float]:
    return (span.start_time or 0) / 1e9, (span.end_time or 0) / 1e9


def test_a_fork_is_a_span_with_one_for_each_phase_in_its_clients_trace(
    tracing: Tracing, exporter: InMemorySpanExporter
) -> None:
    tracing.take(SPAN)

    *phases, fork = exporter.get_finished_spans()
    assert fork.name == "forkvm.fork"
    assert fork.kind is SpanKind.CONSUMER
    assert fork.attributes == {"forkvm.fork_id": "f", "forkvm.status": "succeeded"}
    assert fork.parent is not None
    assert f"{fork.parent.trace_id:032x}-{fork.parent.span_id:016x}" in PARENT
    assert [(phase.name, _seconds(phase)) for phase in phases] == [
        ("queued", (999.0, 1000.0)),
        ("plan", (1000.0, 1002.0)),
        ("copy", (1002.0, 1005.0)),
        ("publish", (1005.0, 1009.0)),
    ]
    assert _seconds(fork) == (999.0, 1009.0)
    assert all(phase.parent == fork.get_span_context() for phase in phases)


def test_a_job_that_is_reported_again_has_its_spans_once(tracing: Tracing, exporter: InMemorySpanExporter) -> None:
    tracing.take(SPAN)
    tracing.take(SPAN)
    tracing.take(["takeover"])

    assert [span.name for span in exporter.get_finished_spans()].count("forkvm.fork") == 1


def test_reports_of_processes_become_spans(tracing: Tracing, exporter: InMemorySpanExporter) -> None:
    pipe = Pipe(counts=False, spans=True)
    spec = ForkSpec(fork_id="f", source="/a", destination="/b", queued=0.5)
    campaign = CampaignSpec(campaign_id="c", source="/a", aims=Aims(count=1))
    pipe.reporter.forks_ended("f", [succeeded(spec, Totals(), 1, Clock(spec.started))], of_campaign=False)
    bad = failed(spec, ForkError(Code.NO_SPACE, "full", "/b"), Totals(), 1, Clock(spec.started))
    pipe.reporter.forks_ended("g", [bad], of_campaign=False)
    pipe.reporter.forks_ended("c.0", [bad], of_campaign=True)
    pipe.reporter.campaign_ended(campaign_result(campaign, {"forks.succeeded": 1}, []))

    for report in pipe.read():
        tracing.take(report)

    jobs = [span for span in exporter.get_finished_spans() if span.name.startswith("forkvm.")]
    assert [(span.name, span.status.status_code) for span in jobs] == [
        ("forkvm.fork", StatusCode.UNSET),
        ("forkvm.fork", StatusCode.ERROR),
        ("forkvm.campaign", StatusCode.UNSET),
    ]
    assert all(span.parent is None for span in jobs)


@pytest.mark.parametrize(
    ("header", "is_kept"),
    [(PARENT, True), ("", False), (PARENT + "-more", False), (PARENT.upper(), False), (3, False), (None, False)],
)
def test_a_client_links_its_trace_by_a_header(header: object, is_kept: bool) -> None:
    task = cast(Any, SimpleNamespace(request=SimpleNamespace(traceparent=header)))

    assert trace_headers(task) == ({"traceparent": header} if is_kept else {})


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c:4318/v1/traces"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", "OTEL_SDK_DISABLED": "true"}, False),
    ],
)
def test_traces_are_sent_to_the_address_in_opentelemetrys_variables(environment: dict[str, str], wanted: bool) -> None:
    assert are_traces_wanted(environment) is wanted
