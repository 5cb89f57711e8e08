"""`forkvm campaign --local` reports exactly what exists when its children, its disk or the process itself fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.filesystems import Fresh, SmallTmpfs
from tests.fixtures.processes import forkvm_script, wait_until
from tests.support.system.queued_campaigns import make_source
from tests.support.system.systems import send
from tests.support.tree import snapshot

COUNT = 3000
#: The number of forks, of sixty thousand, that may still be made after a signal: about 2 s of work on an idle machine.
MORE_FORKS = 2_000


@pytest.fixture
def workdir(fresh: Fresh) -> Path:
    workdir = fresh("xfs")
    make_source(workdir / "source")
    (workdir / "out").mkdir()
    return workdir


@contextmanager
def campaign(workdir: Path, count: int, *options: str) -> Iterator[subprocess.Popen[str]]:
    """A running local campaign. Its remaining processes are killed at the end."""
    to = f"{workdir}/out/vm-{{n:05}}"
    command = [forkvm_script(), "campaign", str(workdir / "source"), "--to", to, "--count", str(count), *options]
    process = subprocess.Popen(
        [*command, "--local", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def forks_in(workdir: Path) -> list[Path]:
    return sorted(path for path in (workdir / "out").iterdir() if path.name.startswith("vm-"))


def children(process: subprocess.Popen[str]) -> list[int]:
    text = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(pid) for pid in text.split()]


def wait_for_forks(workdir: Path, process: subprocess.Popen[str], least: int = 20) -> None:
    wait_until(lambda: len(forks_in(workdir)) > least and len(children(process)) > 0, f"{least} forks")


def end(process: subprocess.Popen[str], workdir: Path) -> dict[str, Any]:
    """The result. Checks that the forks that it names exist, and no others."""
    out, err = process.communicate(timeout=90)
    assert "Traceback" not in err
    result: dict[str, Any] = json.loads(out)
    forks = result["forks"]
    assert forks["succeeded"] == len(forks_in(workdir))
    assert forks["total"] == sum(count for name, count in forks.items() if name != "total")
    assert [path.name for path in (workdir / "out").iterdir() if not path.name.startswith("vm-")] == []
    whole = snapshot(workdir / "source")
    for path in forks_in(workdir)[::100]:
        assert snapshot(path) == whole
    return result


def test_a_stopped_child_delays_a_campaign_and_loses_no_fork(workdir: Path) -> None:
    with campaign(workdir, COUNT) as process:
        wait_for_forks(workdir, process)
        os.kill(children(process)[0], signal.SIGSTOP)

        result = end(process, workdir)

    assert (process.returncode, result["status"], result["error"]) == (0, "succeeded", None)


def test_killed_children_lose_no_fork(workdir: Path) -> None:
    with campaign(workdir, COUNT) as process:
        for _ in range(3):
            wait_for_forks(workdir, process, len(forks_in(workdir)) + 20)
            send(children(process), signal.SIGKILL)  # a child may have ended in the meantime

        result = end(process, workdir)

    assert (process.returncode, result["status"], result["error"]) == (0, "succeeded", None)


@pytest.mark.parametrize("on_error", ["continue", "abort"])
def test_a_full_disk_leaves_exactly_the_reported_forks(on_error: str, small_tmpfs: SmallTmpfs) -> None:
    workdir = small_tmpfs(24 << 20)
    make_source(workdir / "source")
    (workdir / "out").mkdir()

    with campaign(workdir, COUNT, "--on-error", on_error) as process:
        result = end(process, workdir)

    assert (process.returncode, result["status"]) == (1, "partial")
    assert (result["forks"]["cancelled"] > 0) == (on_error == "abort")
    assert result["forks"]["succeeded"] > 0
    assert result["failures"][0]["error"]["code"] == "no_space"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_ends_a_campaign_at_once_and_leaves_only_complete_forks(
    number: signal.Signals, workdir: Path
) -> None:
    with campaign(workdir, 20 * COUNT) as process:
        wait_for_forks(workdir, process)
        before = len(forks_in(workdir))

        os.killpg(process.pid, number)  # a terminal signals the children too
        process.wait(timeout=60)
        result = end(process, workdir)

    assert result["forks"]["succeeded"] - before <= MORE_FORKS
    assert result["status"] == "cancelled"
    assert result["forks"]["cancelled"] > 0
    assert process.returncode in (1, 128 + number)
