"""The traces of a real worker, as a collector receives them over OTLP."""

from __future__ import annotations

from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.fixtures.filesystems import Fresh
from tests.fixtures.processes import wait_until
from tests.support.guests import make_guest
from tests.support.system.scheduler import QUEUE
from tests.support.system.systems import StartSystem

TRACE = "0af7651916cd43dd8448eb211c80319c"


class Collector(ThreadingHTTPServer):
    """Stores the spans that it receives: trace id in hexadecimal, and name."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, str]] = []
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        request = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"])))
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                self.server.spans += [(span.trace_id.hex(), span.name) for span in scope.spans]
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_fork_of_several_tasks_is_in_the_trace_of_its_client(
    collector: Collector, start_system: StartSystem, fresh: Fresh
) -> None:
    # Given
    directory = fresh("ext4")
    make_guest(directory / "a")
    endpoint = f"http://127.0.0.1:{collector.server_port}"
    system = start_system({"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_BSP_SCHEDULE_DELAY": "100"})

    # When
    request = {"source": str(directory / "a"), "destination": str(directory / "b")}
    headers = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}
    sent = system.scheduler.app.send_task(
        "forkvm.fork", kwargs={"request": request}, task_id="traced", queue=QUEUE, headers=headers
    )
    assert system.scheduler.wait(sent)["chunks"] > 1

    # Then
    names = {"queued", "plan", "copy", "publish", "forkvm.fork"}
    wait_until(lambda: {(TRACE, name) for name in names} <= set(collector.spans), "the spans")
    assert len(collector.spans) == len(names)
