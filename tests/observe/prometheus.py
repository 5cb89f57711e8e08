"""A real Prometheus that scrapes workers every second, with the project's own configuration and alerts."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.fixtures.processes import ROOT, ended_at_exit, wait_until
from tests.support.requirements import require_command

CONFIGURATION = ROOT / "deploy/prometheus/prometheus.yml"


class Prometheus:
    """Its HTTP API at `url`."""

    def __init__(self, url: str) -> None:
        self.url = url

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series of an instant query; AssertionError with the reply if Prometheus refuses it."""
        found: list[dict[str, Any]] = self._get("query", query=expression)["result"]
        return found

    def alerts(self, state: str = "firing") -> dict[str, dict[str, str]]:
        """The labels and annotations of each firing alert, by name."""
        return {
            alert["labels"]["alertname"]: alert["labels"] | alert["annotations"]
            for alert in self._get("alerts")["alerts"]
            if alert["state"] == state
        }

    def is_ready(self) -> bool:
        """Whether it answers."""
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/-/ready", timeout=5):
            return True
        return False

    def _get(self, path: str, **parameters: str) -> Any:
        query = urllib.parse.urlencode(parameters)
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=30) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from None


@contextlib.contextmanager
def running_prometheus(directory: Path, target: str) -> Iterator[Prometheus]:
    """A Prometheus with deploy/prometheus/prometheus.yml; only the target's address and the intervals differ."""
    configuration = yaml.safe_load(CONFIGURATION.read_text())
    configuration["global"] |= {"scrape_interval": "1s", "evaluation_interval": "1s", "scrape_timeout": "1s"}
    configuration["rule_files"] = [str(CONFIGURATION.with_name(name)) for name in configuration["rule_files"]]
    (job,) = configuration["scrape_configs"]
    job["static_configs"] = [{"targets": [target]}]
    (directory / "prometheus.yml").write_text(json.dumps(configuration))  # JSON is YAML
    port = free_port()
    with (directory / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(
            [
                require_command("prometheus", "the tests of the dashboard and the alerts"),
                f"--config.file={directory / 'prometheus.yml'}",
                f"--storage.tsdb.path={directory / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=log,
        )
    with ended_at_exit(process):
        prometheus = Prometheus(f"http://127.0.0.1:{port}")
        wait_until(prometheus.is_ready, "Prometheus")
        yield prometheus


def free_port() -> int:
    """A port of 127.0.0.1 on which nothing listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
