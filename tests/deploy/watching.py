"""The profiles of docker-compose.yml: Flower and Prometheus beside the worker.

Grafana is not checked: Debian has no package of it to make a replacement from.
"""

from __future__ import annotations

from typing import Any

from tests.deploy.daemon import Daemon
from tests.deploy.report import Report
from tests.deploy.stack import Container, Stack, wait_for
from tests.deploy.standins import make_prometheus_image

_SERVICES = ("flower", "prometheus")
_PROFILES = ("--profile", "flower", "--profile", "observe")
_TASKS = (
    "http://flower:5555/tasks/datatable?draw=1&start=0&length=100&search%5Bvalue%5D="
    "&order%5B0%5D%5Bcolumn%5D=0&order%5B0%5D%5Bdir%5D=asc&columns%5B0%5D%5Bdata%5D=name"
)


def check_watching(daemon: Daemon, stack: Stack, report: Report) -> None:
    """Both services, with read-only roots and no capabilities, see the worker of compose."""
    with report.check("the profiles of compose: Flower shows a fork, Prometheus scrapes the worker and has the alerts"):
        make_prometheus_image(daemon)
        try:
            stack.compose(*_PROFILES, "up", "--detach", "--build", *_SERVICES)
            label = "label=com.docker.compose.service=flower"
            Container(daemon, daemon.docker("ps", "--quiet", "--filter", label).strip()).wait_healthy()
            wait_for(lambda: "build_info" in str(_ask(stack, "query?query=forkvm_build_info")), "a scrape")
            rules = str(_ask(stack, "rules"))
            assert "ForkvmSilentFullCopies" in rules
            wait_for(lambda: _is_shown(stack), "Flower to show a fork")
        finally:
            stack.compose(*_PROFILES, "rm", "--stop", "--force", *_SERVICES)


def _ask(stack: Stack, path: str) -> Any:
    return stack.client("fetch", f"http://prometheus:9090/api/v1/{path}")


def _is_shown(stack: Stack) -> bool:
    """Send a fork, and return whether Flower shows it. It may end before Flower has turned on the worker's events."""
    stack.fork("shown", {"source": "/guests/small", "destination": "/guests/shown"})
    return "'uuid': 'shown'" in str(stack.client("fetch", _TASKS))
