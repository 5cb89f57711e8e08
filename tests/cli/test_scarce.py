"""Local commands with too few processes or open files, and without /proc."""

from __future__ import annotations

import json
import os
import resource
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.filesystems import Fresh, make_subvolume
from tests.fixtures.processes import PublicProgram, forkvm_script
from tests.support.guests import GuestSizes, make_guest

SMALL = GuestSizes(overlay=8 << 20, overlay_data=1 << 20, memory=8 << 20, memory_data=1 << 20)
#: A user that only these tests use: the process limit counts all processes of a user.
_USER = 54_321


def with_files(count: int) -> Callable[[], None]:
    """Limit a child process to `count` open files."""
    return lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (count, count))


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def workdir(fresh: Fresh) -> Path:
    """A source of three small files, and one of 2,500, which takes more than one process."""
    workdir = fresh("tmpfs")
    for name, count in (("small", 3), ("large", 2_500)):
        (workdir / name).mkdir()
        for number in range(count):
            (workdir / name / f"{number}").write_text("x")
    (workdir / "out").mkdir()
    return workdir


@pytest.mark.parametrize("source", ["small", "large"])
@pytest.mark.parametrize("files", [6, 10, 14, 18, 22, 26, 30])
def test_a_fork_with_few_open_files_is_complete_or_leaves_nothing(source: str, files: int, workdir: Path) -> None:
    command = [forkvm_script(), "fork", str(workdir / source), str(workdir / "out" / "fork")]
    done = subprocess.run(command, preexec_fn=with_files(files), capture_output=True, text=True, check=False)

    assert "Traceback" not in done.stderr
    if done.returncode:
        assert "EMFILE" in done.stderr
        assert "raise its limit of open files" in done.stderr
        assert names(workdir / "out") == []
    else:
        assert len(names(workdir / "out" / "fork")) == len(names(workdir / source))
    assert (done.returncode == 0) == (files > 23)


def test_a_campaign_stays_within_the_limit_of_open_files(workdir: Path) -> None:
    command = [forkvm_script(), "campaign", str(workdir / "small"), "--to", str(workdir / "out" / "vm-{n}")]
    command += ["--count", "200", "--local"]
    done = subprocess.run(command, preexec_fn=with_files(48), capture_output=True, text=True, check=False)

    assert (done.returncode, done.stderr) == (0, "")
    assert len(names(workdir / "out")) == 200


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("command", ["fork", "campaign"])
def test_forks_are_made_when_no_process_can_be_started(
    command: str, processes: int, workdir: Path, public_program: PublicProgram
) -> None:
    for path in (workdir, workdir / "out"):
        os.chown(path, _USER, _USER)
    calls = {
        "fork": ["fork", str(workdir / "large"), str(workdir / "out" / "fork"), "--json"],
        "campaign": ["campaign", str(workdir / "small"), "--to", f"{workdir}/out/vm-{{n}}", "--count", "40", "--local"],
    }
    done = subprocess.run(
        ["prlimit", f"--nproc={processes}", *public_program.command, *calls[command]],
        cwd=public_program.directory,
        env=public_program.environment | {"PATH": os.environ["PATH"]},
        user=_USER,
        group=_USER,
        extra_groups=[],
        capture_output=True,
        text=True,
        check=False,
    )

    assert (done.returncode, done.stderr) == (0, "")
    if command == "fork":
        assert json.loads(done.stdout)["files"]["total"] == 2_500
    assert len(names(workdir / "out")) == (1 if command == "fork" else 40)


@pytest.mark.parametrize("preserve", ["mode,ownership,timestamps,xattrs,hardlinks", "timestamps"])
def test_a_fork_needs_no_proc(preserve: str, workdir: Path) -> None:
    (workdir / "small" / "link").symlink_to("0")

    result = without_proc("fork", str(workdir / "small"), str(workdir / "out" / "fork"), "--preserve", preserve)

    assert os.readlink(workdir / "out" / "fork" / "link") == "0"
    lost = [{"path": "link", "what": "xattrs: those of a symlink cannot be copied without /proc"}]
    assert result["metadata_lost"] == (lost if "xattrs" in preserve else [])


def test_a_subvolume_is_cloned_file_by_file_without_proc(fresh: Fresh) -> None:
    workdir = fresh("btrfs")
    make_guest(make_subvolume(workdir / "vm-1"), SMALL)

    result = without_proc("fork", str(workdir / "vm-1"), str(workdir / "vm-2"))

    assert (result["status"], result["subvolume"]) == ("succeeded", False)


def without_proc(*call: str) -> dict[str, Any]:
    """The output of a command for which /proc is an empty directory."""
    command = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs none /proc && exec "$@"', "sh", forkvm_script()]
    done = subprocess.run([*command, *call, "--json"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    result: dict[str, Any] = json.loads(done.stdout)
    return result
