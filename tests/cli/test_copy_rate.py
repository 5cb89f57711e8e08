"""`forkvm copy-rate`, and the I/O settings of a local fork."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.fixtures.processes import RunForkvm


@pytest.fixture
def runtime(tmp_path: Path) -> dict[str, str]:
    return {"FORKVM_RUNTIME_DIR": str(tmp_path / "runtime")}


def test_the_rate_is_shown_set_and_removed(run_forkvm: RunForkvm, runtime: dict[str, str]) -> None:
    configured = runtime | {"FORKVM_COPY_RATE": "1000000"}

    shown = [run_forkvm("copy-rate", env=env).stdout for env in (runtime, configured)]
    set_to = run_forkvm("copy-rate", "200000000", env=configured).stdout
    as_json = json.loads(run_forkvm("copy-rate", "--json", env=runtime).stdout)
    removed = run_forkvm("copy-rate", "none", env=configured).stdout

    assert shown == ["none (no bound is set)\n", "1000000 (FORKVM_COPY_RATE)\n"]
    assert (set_to, removed) == ("200000000 (set at run time)\n", "none (set at run time)\n")
    assert as_json == {"copy_rate": 200_000_000, "at_run_time": True}


@pytest.mark.parametrize("rate", ["0", "-1", "1000", "1.5", "fast", ""])
def test_an_invalid_rate_is_refused(run_forkvm: RunForkvm, runtime: dict[str, str], rate: str) -> None:
    done = run_forkvm("copy-rate", "--", rate, env=runtime)

    assert done.returncode == 2
    assert "give none, or at least 65536 bytes per second" in done.stderr


def test_an_unusable_directory_is_reported(run_forkvm: RunForkvm, tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    done = run_forkvm("copy-rate", "100000", env={"FORKVM_RUNTIME_DIR": str(tmp_path / "file" / "x")})

    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"forkvm: {tmp_path}/file/x: the copy rate cannot be set: Not a directory\n"
