"""Reports of processes to the main process: each end of a job is counted once, whichever process is killed."""

from __future__ import annotations

import json
import os
import select
import signal
import time
from collections.abc import Callable
from typing import cast

import pytest

from tasks import events
from tasks.copier.campaign.spec import CampaignResult
from tasks.copier.errors import Code, ForkError
from tasks.copier.fork_spec import Clock, ForkResult, ForkSpec, failed, succeeded
from tasks.copier.report import Totals
from tests.fixtures.processes import wait_until
from tests.support.engine.child_processes import in_child
from worker.observability.metrics import Metrics
from worker.observability.reports import Pipe, Report, Reporter


@pytest.fixture
def pipe() -> Pipe:
    return Pipe()


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


def _spec(fork_id: str = "fork-1", destination: str = "/guests/b") -> ForkSpec:
    return ForkSpec(fork_id=fork_id, source="/guests/a", destination=destination, queued=0.5)


def _succeeded(spec: ForkSpec) -> ForkResult:
    totals = Totals(total=4, reflinked=2, copied=1, directories=1, bytes_reflinked=100, bytes_copied=7)
    return succeeded(spec, totals, 1, Clock(spec.started))


def _failed(spec: ForkSpec) -> ForkResult:
    return failed(spec, ForkError(Code.NO_SPACE, "the disk is full", "/guests/b"), Totals(), 0, Clock(spec.started))


def _value(metrics: Metrics, name: str, **labels: str) -> float:
    return metrics.registry.get_sample_value(name, labels) or 0.0


def _count(metrics: Metrics, pipe: Pipe) -> None:
    for report in pipe.read():
        if report[0] != "parent":
            metrics.count(report)


def test_a_fork_is_counted_with_its_files_bytes_and_durations(pipe: Pipe, metrics: Metrics) -> None:
    result = _succeeded(_spec())
    pipe.reporter.forks_ended("fork-1", [result], of_campaign=False)

    _count(metrics, pipe)

    assert _value(metrics, "forkvm_forks_total", status="succeeded", code="", campaign="no") == 1
    assert _value(metrics, "forkvm_files_total", method="reflink") == 2
    assert _value(metrics, "forkvm_files_total", method="mkdir") == 1
    assert _value(metrics, "forkvm_bytes_total", method="reflink") == 100
    assert _value(metrics, "forkvm_bytes_total", method="copy") == 7
    assert _value(metrics, "forkvm_fork_duration_seconds_sum", phase="queued") == 0.5
    assert _value(metrics, "forkvm_fork_duration_seconds_count", phase="total") == 1


def test_a_failed_fork_is_counted_by_its_code_and_has_no_duration(pipe: Pipe, metrics: Metrics) -> None:
    pipe.reporter.forks_ended("fork-1", [_failed(_spec())], of_campaign=False)

    _count(metrics, pipe)

    assert _value(metrics, "forkvm_forks_total", status="failed", code="no_space", campaign="no") == 1
    assert _value(metrics, "forkvm_fork_duration_seconds_count", phase="total") == 0


def test_the_forks_of_a_campaign_are_counted_and_have_no_durations(pipe: Pipe, metrics: Metrics) -> None:
    specs = [_spec(f"c.{n}") for n in range(1000)]
    results = [_succeeded(spec) for spec in specs[:900]] + [_failed(spec) for spec in specs[900:]]
    pipe.reporter.forks_ended("c.0", results, of_campaign=True)

    _count(metrics, pipe)

    assert _value(metrics, "forkvm_forks_total", status="succeeded", code="", campaign="yes") == 900
    assert _value(metrics, "forkvm_forks_total", status="failed", code="no_space", campaign="yes") == 100
    assert _value(metrics, "forkvm_files_total", method="reflink") == 1800
    assert _value(metrics, "forkvm_fork_duration_seconds_count", phase="total") == 0


@pytest.mark.parametrize("destination", ["", "b", "vms/b", "../b"])
def test_the_destination_of_a_refused_request_is_no_place_where_forks_are_made(destination: str, pipe: Pipe) -> None:
    result = _failed(_spec()) | {"destination": destination}
    pipe.reporter.forks_ended("fork-0", [_succeeded(_spec())], of_campaign=False)
    pipe.reporter.forks_ended("fork-1", [result], of_campaign=False)

    assert [report[0] for report in pipe.read()] == ["forks", "parent", "forks"]


@pytest.mark.parametrize(("make", "status", "code"), [(_succeeded, "succeeded", ""), (_failed, "failed", "no_space")])
def test_a_job_that_is_reported_again_is_counted_once(
    make: Callable[[ForkSpec], ForkResult], status: str, code: str, pipe: Pipe, metrics: Metrics
) -> None:
    """Its first process was killed after it reported the job, and before it stored the result."""
    for _ in range(2):
        pipe.reporter.forks_ended("fork-1", [make(_spec())], of_campaign=False)
        pipe.reporter.forks_ended("c.0", [make(_spec("c.1"))], of_campaign=True)
        pipe.reporter.campaign_ended(cast(CampaignResult, {"campaign_id": "c", "status": "partial"}))

    _count(metrics, pipe)

    assert _value(metrics, "forkvm_forks_total", status=status, code=code, campaign="no") == 1
    assert _value(metrics, "forkvm_forks_total", status=status, code=code, campaign="yes") == 1
    assert _value(metrics, "forkvm_campaigns_total", status="partial") == 1


def test_reports_of_killed_children_are_not_lost(pipe: Pipe, metrics: Metrics) -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    for n in range(20):
        child = os.fork()
        if child == 0:
            pipe.reporter.forks_ended(f"fork-{n}", [_succeeded(_spec(f"fork-{n}"))], of_campaign=False)
            os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(child, 0)

    _count(metrics, pipe)

    assert _value(metrics, "forkvm_forks_total", status="succeeded", code="", campaign="no") == 20
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_a_report_with_long_names_is_written_completely(pipe: Pipe) -> None:
    spec = _spec("\U0001f4be" * 512, "/" + "\x01" * 4000 + "/b")
    pipe.reporter.forks_ended(spec.fork_id, [_succeeded(spec)], of_campaign=False)

    (report,) = pipe.read()  # the path is too long for one

    assert report[0] == "forks"
    assert len(json.dumps(report)) < select.PIPE_BUF


def test_a_reporter_does_not_wait_for_a_main_process_that_has_stopped(caplog: pytest.LogCaptureFixture) -> None:
    read_fd, write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    reporter = Reporter(write_fd)
    while True:
        try:
            os.write(write_fd, b"x" * 4096)
        except BlockingIOError:
            break
    began = time.monotonic()

    for _ in range(100):  # only the first report waits
        reporter.happened("takeover", "")

    assert time.monotonic() - began < 30
    assert caplog.text.count("a report for the metrics was lost") == 1
    assert "a report for the metrics was lost" in caplog.text
    os.close(read_fd)
    os.close(write_fd)


def test_a_report_that_cannot_be_counted_does_not_end_the_reader(pipe: Pipe, caplog: pytest.LogCaptureFixture) -> None:
    taken = []

    def take(report: Report) -> None:
        taken.append(report)
        raise KeyError(report[0])

    pipe.start([take])
    pipe.reporter.happened("takeover", "")
    wait_until(lambda: len(taken) == 1, "the first report")
    pipe.reporter.happened("takeover", "")
    wait_until(lambda: len(taken) == 2, "the second report")

    assert "a report for the metrics was not counted: KeyError: 'takeover'" in caplog.text


def test_without_an_observer_nothing_happens() -> None:
    events.forks_ended("fork-1", [_succeeded(_spec())], of_campaign=False)
    events.happened("retry", "held")


def test_a_child_of_a_child_keeps_a_file_that_has_the_number_of_the_closed_pipe(pipe: Pipe) -> None:
    def in_child_of_child() -> bool:
        taken = [os.open(os.devnull, os.O_RDONLY) for _ in range(8)]
        return in_child(lambda: all(os.fstat(fd) for fd in taken))

    assert in_child(in_child_of_child)
    assert list(pipe.read()) == []
