"""deploy/kubernetes: the requirements of a worker in a pod.

`make test-deploy` compares it with the schemas of Kubernetes.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.fixtures.processes import ROOT
from worker.settings import read_settings

MANIFEST = ROOT / "deploy/kubernetes/worker.yaml"


@pytest.fixture
def pod() -> dict[str, Any]:
    daemon_set = yaml.safe_load(MANIFEST.read_text())
    assert daemon_set["kind"] == "DaemonSet"
    found: dict[str, Any] = daemon_set["spec"]["template"]["spec"]
    return found


def _worker(pod: dict[str, Any]) -> dict[str, Any]:
    (container,) = pod["containers"]
    found: dict[str, Any] = container
    return found


def test_pod_has_no_more_rights_than_security_md_names(pod: dict[str, Any]) -> None:
    context = _worker(pod)["securityContext"]
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["worker"]
    (as_root,) = re.findall(r"add: \[([A-Z_, ]+)\]", MANIFEST.read_text())

    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert context == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert as_root.split(", ") == compose["cap_add"]
    assert pod["automountServiceAccountToken"] is False


def test_user_of_the_pod_is_that_of_the_image(pod: dict[str, Any]) -> None:
    context = pod["securityContext"]

    assert f"\nUSER {context['runAsUser']}:{context['runAsGroup']}\n" in (ROOT / "Dockerfile").read_text()


def test_probes_use_the_port_of_the_worker(pod: dict[str, Any]) -> None:
    worker = _worker(pod)
    environment = {variable["name"]: variable.get("value") for variable in worker["env"]}
    (port,) = worker["ports"]

    assert environment["FORKVM_HTTP"] == f"0.0.0.0:{port['containerPort']}"
    asked = {probe: worker[f"{probe}Probe"]["httpGet"] for probe in ("startup", "liveness", "readiness")}
    assert asked == {
        "startup": {"path": "/livez", "port": port["name"]},
        "liveness": {"path": "/livez", "port": port["name"]},
        "readiness": {"path": "/readyz", "port": port["name"]},
    }


def test_guests_are_one_mount_of_an_existing_directory_of_the_node(pod: dict[str, Any]) -> None:
    environment = {variable["name"]: variable.get("value") for variable in _worker(pod)["env"]}
    (guests,) = [mount for mount in _worker(pod)["volumeMounts"] if mount["name"] == "guests"]
    (volume,) = [volume for volume in pod["volumes"] if volume["name"] == "guests"]

    assert environment["FORKVM_ROOTS"] == guests["mountPath"]
    assert volume["hostPath"]["type"] == "Directory"


def test_settings_come_from_the_manifest_and_from_a_secret_in_the_layout_of_kubernetes(
    pod: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # A secret is a directory of symlinks, through another symlink that is exchanged when the secret changes.
    data = tmp_path / "..2026_01_01_00_00_00.1"
    data.mkdir()
    (data / "forkvm_broker_url").write_text("redis://:secret@redis:6379/0")
    (tmp_path / "..data").symlink_to(data.name)
    (tmp_path / "forkvm_broker_url").symlink_to("..data/forkvm_broker_url")
    for name in [name for name in os.environ if name.startswith("FORKVM_")]:
        monkeypatch.delenv(name)
    for variable in _worker(pod)["env"]:
        monkeypatch.setenv(variable["name"], variable.get("value", "node-7.example"))
    (mount,) = [mount for mount in _worker(pod)["volumeMounts"] if mount["name"] == "settings"]
    assert os.environ["FORKVM_SECRETS_DIR"] == mount["mountPath"]
    monkeypatch.setenv("FORKVM_SECRETS_DIR", str(tmp_path))

    settings = read_settings()

    assert (settings.queue, settings.roots) == ("forkvm.node-7.example", ("/guests",))
    assert settings.broker_url == "redis://:secret@redis:6379/0"
    assert capsys.readouterr().err == ""  # no variable is unknown
