"""The alerts, the dashboard, and the services of compose that show them.

`make test-observe` runs the dashboard's queries and an alert with a real Prometheus and a real worker.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.fixtures.processes import ROOT
from tests.support.requirements import require_command

PROMETHEUS = ROOT / "deploy/prometheus"
GRAFANA = ROOT / "deploy/grafana"
RUNBOOK = ROOT / "docs/runbook.md"
#: A name in a query; `_bucket`, `_sum` and `_count` are of a histogram.
_METRIC = re.compile(r"\bforkvm_\w+?(?=(?:_bucket|_sum|_count)?\b)")


def _alerts() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"]
    return [rule for rule in group["rules"] if "alert" in rule]


def _promtool(*arguments: str | Path) -> None:
    command = require_command("promtool", "the tests of the alerts")
    done = subprocess.run([command, *arguments], capture_output=True, text=True, timeout=120)

    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("tests", sorted(PROMETHEUS.glob("*.test.yml")), ids=lambda path: path.name)
def test_alerts_fire_when_they_should_and_not_otherwise(tests: Path) -> None:
    _promtool("test", "rules", tests)


def test_prometheus_accepts_its_configuration() -> None:
    _promtool("check", "config", PROMETHEUS / "prometheus.yml")


def test_each_alert_is_tested_and_has_a_reason_and_a_section_of_the_runbook() -> None:
    tested = "".join(path.read_text() for path in PROMETHEUS.glob("*.test.yml"))
    sections = re.findall(r"^## (\w+)$\n\n\*\*Why\.\*\* ", RUNBOOK.read_text(), re.MULTILINE)
    alerts = {alert["alert"]: alert for alert in _alerts()}

    assert sections == list(alerts)
    for name, alert in alerts.items():
        annotations = alert["annotations"]
        assert annotations["runbook_url"].endswith(f"/docs/runbook.md#{name.lower()}")
        assert annotations["summary"]
        assert annotations["description"] in tested
        assert f"alertname: {name}\n        exp_alerts:" in tested


def test_alerts_and_dashboard_use_only_documented_metrics() -> None:
    documented = set(re.findall(r"`(forkvm_\w+)`", (ROOT / "docs/operations.md").read_text()))
    rules = [rule["expr"] for rule in yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"][0]["rules"]]
    recorded = re.compile(r"instance:forkvm_\w+:\w+")  # not a metric of the worker
    dashboard = json.loads((GRAFANA / "forkvm.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]

    asked = {name for query in [*rules, *queries] for name in _METRIC.findall(recorded.sub("", query))}

    assert asked <= documented
    assert len(asked) > 15


def test_grafana_finds_the_dashboard_and_its_data_source() -> None:
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    mounts = dict(volume.split(":")[:2][::-1] for volume in compose["grafana"]["volumes"])
    (provider,) = yaml.safe_load((GRAFANA / "provisioning/dashboards/forkvm.yml").read_text())["providers"]
    (source,) = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yml").read_text())["datasources"]
    shown = compose["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]

    assert mounts["/etc/grafana/provisioning"] == "./deploy/grafana/provisioning"
    assert mounts[shown] == "./deploy/grafana/forkvm.json"
    assert Path(shown).parent == Path(provider["options"]["path"])
    assert source["url"] == "http://prometheus:9090"
    assert "prometheus" in compose


def test_prometheus_scrapes_the_worker_of_compose() -> None:
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    (job,) = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())["scrape_configs"]
    port = compose["worker"]["environment"]["FORKVM_HTTP"].rpartition(":")[2]

    assert job["static_configs"] == [{"targets": [f"worker:{port}"]}]


def test_services_to_watch_start_on_request_only_with_few_rights_and_are_reached_from_this_host_only() -> None:
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]

    profiles = {name: service["profiles"] for name, service in compose.items() if "profiles" in service}
    assert profiles == {"flower": ["flower"], "prometheus": ["observe"], "grafana": ["observe"]}
    for name in profiles:
        assert compose[name]["cap_drop"] == ["ALL"]
        assert compose[name]["security_opt"] == ["no-new-privileges:true"]
        assert all(port.startswith("127.0.0.1:") for port in compose[name]["ports"])
