"""Closed, full or unread standard streams change no exit code and cause no traceback."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.fixtures.processes import forkvm_script
from tests.support.requirements import require

_ESCAPE = "a\x1b]0;pwned\x07"


def shell(script: str, directory: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run `script` in bash in `directory`, where $F is the command and no setting is made."""
    bare = {name: value for name, value in os.environ.items() if not name.startswith(("FORKVM_", "LC_", "LANG"))}
    return subprocess.run(
        ["bash", "-c", script],
        cwd=directory,
        env={**bare, "F": forkvm_script(), **environment},
        capture_output=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "src"
    path.mkdir()
    (path / "a").write_text("x")
    return path


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
def test_a_fork_needs_no_open_stream(closed: str, source: Path, tmp_path: Path) -> None:
    done = shell(f"$F fork src dst {closed}; echo $? > code", tmp_path)

    assert (tmp_path / "code").read_text() == "0\n"
    assert (tmp_path / "dst" / "a").read_text() == "x"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["code", "dst", "src"]
    assert b"Traceback" not in done.stderr


#: Runs forkvm with the arguments that follow, and its output into a pipe that nobody reads.
_ON_CLOSED_PIPE = (
    'python3 -c "import os, subprocess, sys; r, w = os.pipe(); os.close(r); '
    "sys.exit(subprocess.call([os.environ['F'], *sys.argv[1:]], stdout=w))\""
)


@pytest.mark.parametrize("command", ["fork src dst", "fork --json src dst", "verify src same", "--help", "--version"])
def test_a_closed_pipe_changes_no_exit_code(command: str, source: Path, tmp_path: Path) -> None:
    done = shell(f"cp -a src same; {_ON_CLOSED_PIPE} {command}", tmp_path)

    assert (done.returncode, done.stderr) == (0, b"")


def test_differences_exit_with_1_on_a_closed_pipe_too(source: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()

    done = shell(f"{_ON_CLOSED_PIPE} verify src other", tmp_path)

    assert (done.returncode, done.stderr) == (1, b"")


def test_output_that_cannot_be_written_is_one_line_on_stderr(source: Path, tmp_path: Path) -> None:
    done = shell("$F fork src dst > /dev/full", tmp_path)

    assert done.returncode == 0
    assert done.stderr == b"forkvm: the result could not be written to stdout: No space left on device\n"


def test_a_pipe_that_another_process_made_non_blocking_gets_all_output(source: Path, tmp_path: Path) -> None:
    """The reader is slow, and 2,000 lines are more than the pipe can hold."""
    other = tmp_path / "other"
    other.mkdir()
    for number in range(2_000):
        (other / f"{number:060}").touch()
    script = (
        "import fcntl, os, subprocess, sys, termios, time\n"
        "r, w = os.pipe(); fcntl.fcntl(w, fcntl.F_SETFL, os.O_NONBLOCK); fcntl.fcntl(w, fcntl.F_SETPIPE_SZ, 4096)\n"
        "p = subprocess.Popen([os.environ['F'], 'verify', 'src', 'other'], stdout=w); os.close(w)\n"
        "held = lambda: int.from_bytes(fcntl.ioctl(r, termios.FIONREAD, bytes(4)), sys.byteorder)\n"
        "while p.poll() is None and held() < 4096: time.sleep(0.01)\n"
        "lines = os.fdopen(r).read().count('\\n'); print(lines, p.wait())"
    )

    done = shell(f'python3 -c "{script}"', tmp_path)

    lines, code = map(int, done.stdout.split())
    assert (lines > 2_000, code) == (True, 1)


@pytest.mark.parametrize(
    "call", ['fork src dst "$E"', 'campaign src --to-file "$E"', 'fork "$E" dst', '"$E"', 'fork --label "$E" "$E" dst']
)
def test_no_escape_sequence_in_an_argument_reaches_the_terminal(call: str, source: Path, tmp_path: Path) -> None:
    done = shell(f"$F {call}", tmp_path, E=_ESCAPE)

    assert done.returncode in (1, 2)
    assert b"\x1b" not in done.stderr + done.stdout
    assert rb"\x1b]0;pwned\x07" in done.stderr


@pytest.mark.parametrize(("locale", "charset"), [("de_DE", "ISO-8859-1"), ("zh_TW", "BIG5")])
def test_a_legacy_locale_changes_no_byte_of_a_name(locale: str, charset: str, source: Path, tmp_path: Path) -> None:
    localedef = require(shutil.which("localedef"), "localedef (Debian package libc-bin)", "the tests of legacy locales")
    name = f"{locale}.{charset}"
    subprocess.run([localedef, "-i", locale, "-f", charset, str(tmp_path / name)], capture_output=True, check=False)
    assert (tmp_path / name).is_dir(), "Debian package locales"
    for entry in (b"\xa2\xcc", b"gr\xc3\xbcn", b"\xff"):
        os.close(os.open(os.fsencode(source) + b"/" + entry, os.O_CREAT))

    done = shell("$F fork src grün --json && $F verify src grün", tmp_path, LOCPATH=str(tmp_path), LC_ALL=name)

    assert done.returncode == 0, done.stderr
    assert b'"destination": "' + os.fsencode(tmp_path) + b"/gr\\u00fcn" in done.stdout
    assert sorted(os.listdir(os.fsencode(tmp_path / "grün"))) == sorted(os.listdir(os.fsencode(source)))
