"""The dashboard's queries and the alerts, on metrics that a real Prometheus scraped from a real worker."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from tests.fixtures.filesystems import Fresh, bind_mounted
from tests.fixtures.processes import ROOT, StartWorker, Worker, wait_until
from tests.observe.prometheus import Prometheus, free_port, running_prometheus
from tests.support.guests import make_guest

_DASHBOARD = json.loads((ROOT / "deploy/grafana/forkvm.json").read_text())
#: The values that Grafana inserts for the variables of the dashboard.
_VARIABLES = {"$job": ".*", "$instance": ".*", "$__rate_interval": "30s", "$__range": "5m"}
#: Seconds until scrapes show an event, also on a busy machine.
_TIMEOUT = 90.0

Send = Callable[..., Any]


@pytest.fixture
def send(foreign_client: Celery) -> Send:
    """Send a job, wait for its end, and return its result, or the exception of a failed job."""
    numbers = itertools.count(1)

    def send(task: str, **request: Any) -> Any:
        job = f"job-{next(numbers)}"
        sent = foreign_client.send_task(task, kwargs={"request": request}, task_id=job, queue="forkvm")
        return sent.get(timeout=60, propagate=False)

    return send


@pytest.fixture
def address() -> str:
    """The address of the worker's metrics, the same after a restart."""
    return f"127.0.0.1:{free_port()}"


@pytest.fixture
def prometheus(address: str, tmp_path: Path) -> Iterator[Prometheus]:
    with running_prometheus(tmp_path, address) as prometheus:
        yield prometheus


def test_each_query_of_the_dashboard_returns_data_under_load(
    fresh: Fresh, start_worker: StartWorker, address: str, prometheus: Prometheus, send: Send
) -> None:
    guests, archive = fresh("xfs"), fresh("ext4")
    make_guest(guests / "a")
    start_worker([guests, archive], command="forkvm", env={"FORKVM_HTTP": address})
    unanswered = [target["expr"] for panel in _DASHBOARD["panels"] for target in panel.get("targets", [])]
    assert len(unanswered) > 20

    deadline = time.monotonic() + _TIMEOUT
    for number in itertools.count():
        source = str(guests / "a")
        send("forkvm.fork", source=source, destination=str(guests / f"fork-{number}"))
        send("forkvm.fork", source=source, destination=str(archive / f"fork-{number}"))
        send("forkvm.fork", source=str(guests / "nothing"), destination=str(guests / f"none-{number}"))
        send("forkvm.campaign", source=source, destinations=[str(guests / f"campaign-{number}-{n}") for n in range(3)])
        unanswered = [expression for expression in unanswered if not _numbers(prometheus, expression)]
        if not unanswered or time.monotonic() > deadline:
            break

    assert unanswered == []


def test_an_alert_fires_when_a_root_is_moved_to_a_filesystem_without_reflinks(
    fresh: Fresh, mounts: Path, start_worker: StartWorker, address: str, prometheus: Prometheus, send: Send
) -> None:
    root = mounts / "moved"
    numbers = itertools.count(1)

    def fork() -> Any:
        return send("forkvm.fork", source=str(root / "a"), destination=str(root / f"fork-{next(numbers)}"))

    def start() -> Worker:
        make_guest(root / "a")
        return start_worker(root, command="forkvm", env={"FORKVM_HTTP": address})

    with bind_mounted(fresh("xfs"), root):
        worker = start()
        assert fork()["fallback"] is None
        reflinked = 'forkvm_files_total{method="reflink"} > 0'
        wait_until(lambda: bool(prometheus.query(reflinked)), "the metrics of a reflinked fork", _TIMEOUT)
        assert prometheus.alerts() == {}
        worker.end()

    with bind_mounted(fresh("ext4"), root):
        worker = start()
        deadline = time.monotonic() + _TIMEOUT
        while "ForkvmSilentFullCopies" not in (firing := prometheus.alerts()) and time.monotonic() < deadline:
            assert fork()["status"] == "succeeded"  # no other metric shows that everything is copied
        worker.end()

    assert set(firing) == {"ForkvmSilentFullCopies"}
    alert = firing["ForkvmSilentFullCopies"]
    found = [alert[name] for name in ("instance", "errno", "source_filesystem", "destination_filesystem", "severity")]
    assert found == [address, "EOPNOTSUPP", "ext4", "ext4", "critical"]
    print(json.dumps(alert, indent=2))  # `make test-observe` shows it


def _numbers(prometheus: Prometheus, expression: str) -> list[float]:
    """The values of a query of the dashboard, without NaN, which is 0 / 0."""
    for variable, value in _VARIABLES.items():
        expression = expression.replace(variable, value)
    values = [float(series["value"][1]) for series in prometheus.query(expression)]
    return [value for value in values if not math.isnan(value)]
