"""The dashboard against Grafana's own published types (`@grafana/schema` of npm), checked by TypeScript."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.fixtures.processes import ROOT
from tests.support.requirements import require_command

#: The versions with which this check was written.
PACKAGES = ("@grafana/schema@13.2.3", "typescript@5.9.3")
OPTIONS = ("--strict", "--noEmit", "--skipLibCheck", "--module", "esnext", "--moduleResolution", "bundler")
DASHBOARD = (ROOT / "deploy/grafana/forkvm.json").read_text()


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("grafana")
    npm = require_command("npm", "Grafana's types")
    subprocess.run(
        [npm, "install", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", path, *PACKAGES],
        check=True,
        timeout=300,
    )
    return path


def _errors(project: Path, dashboard: str) -> str:
    """What TypeScript says about a dashboard (JSON)."""
    # In JSON an enumeration is its value, which TypeScript does not take for the enumeration.
    dashboard = dashboard.replace('"mode": "absolute"', '"mode": ThresholdsMode.Absolute')
    source = 'import { ThresholdsMode, type Dashboard } from "@grafana/schema";\nexport const dashboard: Dashboard = '
    (project / "dashboard.ts").write_text(f"{source}{dashboard};\n")
    node = require_command("node", "the check of Grafana's types")
    done = subprocess.run(
        [node, "node_modules/typescript/bin/tsc", *OPTIONS, "dashboard.ts"],
        cwd=project,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.stdout


def test_the_dashboard_is_one_by_the_types_of_grafana(project: Path) -> None:
    assert _errors(project, DASHBOARD) == ""


@pytest.mark.parametrize(
    ("right", "wrong"), [('"refresh": 2', '"refresh": "soon"'), ('"panels":', '"panel":'), ('"gridPos"', '"grid"')]
)
def test_a_dashboard_of_another_form_is_found(project: Path, right: str, wrong: str) -> None:
    assert "error TS" in _errors(project, DASHBOARD.replace(right, wrong, 1))
