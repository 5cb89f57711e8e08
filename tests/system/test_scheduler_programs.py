"""The programs of docs/scheduler.md, run as printed; and its table of error codes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.contract.remedies import REMEDIES
from tests.fixtures.filesystems import Fresh
from tests.support.guests import make_guest
from tests.support.requirements import require_command
from tests.support.system.systems import System

_DOCUMENT = (Path(__file__).parents[2] / "docs" / "scheduler.md").read_text()
_TIMEOUT = 120.0


def _program(language: str, directory: Path) -> str:
    (text,) = re.findall(rf"^```{language}\n(.*?)^```$", _DOCUMENT, re.MULTILINE | re.DOTALL)
    path = directory / f"program.{language}"
    path.write_text(text)
    return str(path)


def _run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    env = {"PATH": os.environ["PATH"]} | environment
    return subprocess.run(words, env=env, capture_output=True, text=True, timeout=_TIMEOUT, check=False)


@pytest.fixture
def guests(fresh: Fresh) -> Path:
    """A directory with a guest `a`, and an empty directory `taken`."""
    directory = fresh("xfs")
    make_guest(directory / "a")
    (directory / "taken").mkdir()
    return directory


def test_the_program_in_python_makes_forks_and_reports_a_failure(system: System, guests: Path, tmp_path: Path) -> None:
    program = _program("python", tmp_path)
    url = system.server.broker_url

    good = _run(sys.executable, program, guests / "a", guests / "b", guests / "c", REDIS_URL=url)
    bad = _run(sys.executable, program, guests / "a", guests / "taken", REDIS_URL=url)

    assert (good.returncode, good.stderr) == (0, "")
    assert [line.partition(":")[0] for line in good.stdout.splitlines()] == [str(guests / "b"), str(guests / "c")]
    assert (guests / "b").is_dir()
    assert (guests / "c").is_dir()
    assert bad.returncode == 1
    assert "FAILURE: destination_exists: " in bad.stderr


def test_the_program_in_javascript_makes_a_campaign(system: System, guests: Path, tmp_path: Path) -> None:
    program, node = _program("javascript", tmp_path), require_command("node", "the program in docs/scheduler.md")
    redis = str(system.server.socket)

    good = _run(node, program, guests / "a", f"{guests}/vm-{{n:03}}", "5", REDIS=redis)
    bad = _run(node, program, guests / "missing", f"{guests}/no-{{n}}", "2", REDIS=redis)

    assert good.returncode == 0, good.stderr
    assert [line.rpartition(".")[2] for line in good.stdout.splitlines()] == [f"{n}: SUCCESS" for n in range(1, 6)]
    assert all((guests / f"vm-{n:03}").is_dir() for n in range(1, 6))
    assert bad.returncode == 1
    assert "FAILURE" in bad.stderr
    assert "source_not_found" in bad.stderr


def test_the_program_in_a_shell_makes_a_fork_once(system: System, guests: Path, tmp_path: Path) -> None:
    program = _program("bash", tmp_path)
    require_command("redis-cli", "the program in docs/scheduler.md")
    options = f"-s {system.server.socket}"

    first = _run("bash", program, guests / "a", guests / "b", "from-a-shell", REDIS_OPTIONS=options)
    again = _run("bash", program, guests / "a", guests / "b", "from-a-shell", REDIS_OPTIONS=options)
    bad = _run("bash", program, guests / "a", guests / "taken", "taken", REDIS_OPTIONS=options)

    assert (first.returncode, first.stdout, first.stderr) == (0, f"{guests / 'b'}\n", "")
    assert (again.returncode, again.stdout) == (0, f"{guests / 'b'}\n")
    assert bad.returncode == 1
    assert "destination_exists" in bad.stderr


def test_the_table_says_what_to_do_for_each_error_code() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (yes|no) \| (.*) \|$", _DOCUMENT, re.MULTILINE)

    assert rows == [
        (code, remedy.side, "yes" if remedy.may_pass else "no", remedy.text) for code, remedy in REMEDIES.items()
    ]


def test_the_program_in_python_retries_temporary_errors() -> None:
    (words,) = re.findall(r"^MAY_PASS = {(.*)}$", _DOCUMENT, re.MULTILINE)

    may_pass = {
        code for code, remedy in REMEDIES.items() if remedy.may_pass and code not in ("cancelled", "verify_failed")
    }
    assert set(re.findall(r'"(\w+)"', words)) == may_pass
