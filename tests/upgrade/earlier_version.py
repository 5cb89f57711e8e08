"""Installs the earlier version: a wheel of a commit, in a virtual environment."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.fixtures.processes import ROOT
from tests.support.requirements import require_command

#: The version that an upgrade starts from: the last commit with another layout of the modules.
EARLIER_COMMIT = "a71a27077241cfd13d4c26f1e8c1f9d236a00026"


def script_in(directory: Path) -> Path:
    """The script `forkvm` of the earlier version, where `install` has installed it."""
    return directory / "environment" / "bin" / "forkvm"


def install(directory: Path) -> None:
    """Install the earlier version below an empty directory.

    The source comes from git. In an sdist there is no git repository, and a shallow clone may lack the commit: then the
    test is skipped, in CI too, since no package can bring the commit. The dependencies are those of the running Python,
    since installing them again takes most of a minute.
    """
    why = "the tests of an upgrade from it"
    git = require_command("git", why)
    found = _run_unchecked(git, "-C", str(ROOT), "cat-file", "-e", f"{EARLIER_COMMIT}^{{commit}}")
    if found.returncode != 0:
        pytest.skip(
            f"no commit {EARLIER_COMMIT[:12]}: {found.stderr.strip()}; in a shallow clone: git fetch --unshallow"
        )
    source, environment = directory / "source", directory / "environment"
    source.mkdir()
    _run(git, "-C", str(ROOT), "archive", "-o", str(directory / "source.tar"), EARLIER_COMMIT)
    _run("tar", "-xf", str(directory / "source.tar"), "-C", str(source))
    _run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(directory), cwd=source)
    shutil.rmtree(source)
    (wheel,) = directory.glob("*.whl")
    venv.create(environment, symlinks=True)
    python = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    _run(*pip, "--disable-pip-version-check", "--no-index", "--no-deps", str(wheel))
    packages = Path(_run(str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    imported = _run(str(python), "-c", "import tasks, worker; print(tasks.__file__, worker.__file__)")
    assert [Path(name).parent.parent for name in imported.split()] == [packages, packages]


def _run(*command: str, cwd: Path = Path("/")) -> str:
    done = _run_unchecked(*command, cwd=cwd)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def _run_unchecked(*command: str, cwd: Path = Path("/")) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)
