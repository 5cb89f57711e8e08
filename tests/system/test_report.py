"""`forkvm report`: one page about an ended fork or campaign."""

from __future__ import annotations

import json
import os
from pathlib import Path

from tests.fixtures.filesystems import Fresh
from tests.fixtures.processes import RunForkvm, program_environment
from tests.support.guests import make_guest
from tests.support.system.systems import System


def test_report_writes_a_page_about_a_fork_and_about_a_campaign(
    system: System, fresh: Fresh, run_forkvm: RunForkvm, tmp_path: Path
) -> None:
    # Given
    directory, environment = fresh("xfs"), program_environment(system.server)
    source = make_guest(directory / "a")
    hostile = source / os.fsdecode(b"<script>\xff\x1b[2J.raw")
    hostile.write_bytes(b"data")
    system.scheduler.fork(source, directory / "b", "one fork")
    destinations = [str(directory / "c-1"), str(directory / "b")]
    request = {"source": str(source), "destinations": destinations}
    system.scheduler.app.send_task("forkvm.campaign", kwargs={"request": request}, task_id="many", queue="forkvm").get(
        timeout=60
    )

    # When: the path is relative
    fork = run_forkvm("report", "one fork", "-o", "fork.html", env=environment)
    campaign = run_forkvm("report", "many", "-o", "many.html", "--json", env=environment)

    # Then
    assert [(done.returncode, done.stderr) for done in (fork, campaign)] == [(0, "")] * 2
    assert fork.stdout == ""
    assert json.loads(campaign.stdout) == {"id": "many", "status": "partial", "file": str(tmp_path / "many.html")}
    of_fork = (tmp_path / "fork.html").read_text()
    assert "&lt;script&gt;\\udcff\\x1b[2J.raw" in of_fork
    assert "succeeded" in of_fork
    of_campaign = (tmp_path / "many.html").read_text()
    assert "destination_exists" in of_campaign
    assert "Choose another destination" in of_campaign
    assert "1 of 2 forks" in of_campaign
