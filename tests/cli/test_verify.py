"""`forkvm verify`: its output. It never reports files that it could not read as equal."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.fixtures.filesystems import Fresh
from tests.fixtures.processes import RunForkvm, forkvm_script
from tests.support.requirements import require_command

_NOBODY = 65534


def forked_pair(workdir: Path, run_forkvm: RunForkvm) -> tuple[Path, Path]:
    source, clone = workdir / "source", workdir / "clone"
    (source / "below").mkdir(parents=True)
    (source / "disk").write_bytes(b"data" * 1000)
    os.setxattr(source / "disk", "user.known", b"1")
    (source / "below" / "state").write_text("paused")
    (source / "link").symlink_to("disk")
    assert run_forkvm("fork", source, clone).returncode == 0
    return source, clone


@pytest.mark.parametrize("side", ["source", "clone"])
def test_unreadable_files_are_not_reported_as_equal(run_forkvm: RunForkvm, fresh: Fresh, side: str) -> None:
    workdir = fresh("xfs")
    workdir.chmod(0o755)
    source, clone = forked_pair(workdir, run_forkvm)
    (source / "disk").chmod(0o644)
    (clone / "disk").chmod(0o644)
    for path in (source, clone):
        (path / "below").chmod(0o755)
    hidden = workdir / side
    (hidden / "secret").write_text("x")
    (hidden / "secret").chmod(0o600)
    other = clone if side == "source" else source
    subprocess.run(["cp", "-p", hidden / "secret", other / "secret"], check=True)
    os.utime(other, ns=(0, hidden.stat().st_mtime_ns))
    for path in (source / "below", clone / "below"):
        path.chmod(0o700)

    done = run_forkvm("verify", source, clone, user=_NOBODY)
    document = run_forkvm("verify", source, clone, "--json", user=_NOBODY)

    assert (done.returncode, document.returncode) == (1, 1)
    assert "could not be compared completely" in done.stdout.splitlines()[-2]
    assert "are the same" not in done.stdout
    assert "Traceback" not in done.stderr
    found = json.loads(document.stdout)
    assert (found["same"], found["differences"], found["unread_total"]) == (False, [], 2)
    unread = {one["path"]: one["what"] for one in found["unread"]}
    assert "the source: opening the directory: Permission denied (EACCES)" in unread["below"]
    assert "opening the file: Permission denied (EACCES)" in unread["secret"]


@pytest.mark.parametrize(
    ("call", "path", "at", "what"),
    [
        ("pread64:error=EIO", "disk", "disk", "reading: Input/output error (EIO)"),
        ("openat:error=EIO", "disk", "disk", "opening the file: Input/output error (EIO)"),
        ("fgetxattr:error=EIO", "disk", "disk", "reading its extended attributes: Input/output error (EIO)"),
        ("flistxattr:error=E2BIG", "disk", "disk", "reading its extended attributes: Argument list too long"),
        ("getdents64:error=EIO", "below", "below", "listing the directory: Input/output error (EIO)"),
    ],
)
def test_files_with_read_errors_are_not_reported_as_equal(
    run_forkvm: RunForkvm, fresh: Fresh, call: str, path: str, at: str, what: str
) -> None:
    strace = require_command("strace", "injecting errors")
    source, clone = forked_pair(fresh("xfs"), run_forkvm)

    # strace matches a path as the call gives it: relative for calls that open, absolute for calls with a descriptor.
    names = [str(clone / path)] if "openat" not in call else [path]
    command = [strace, "-f", "-o", "/dev/null", *(part for name in names for part in ("-P", name))]
    command += ["-e", f"inject={call}", forkvm_script(), "verify", str(source), str(clone), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)

    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert (found["same"], found["differences"]) == (False, [])
    assert {one["path"] for one in found["unread"]} == {at}
    assert what in found["unread"][0]["what"]


def test_files_that_vanish_during_the_comparison_are_not_reported_as_equal(run_forkvm: RunForkvm, fresh: Fresh) -> None:
    strace = require_command("strace", "injecting errors")
    source, clone = forked_pair(fresh("xfs"), run_forkvm)

    command = [strace, "-f", "-o", "/dev/null", "-e", "inject=readlinkat:error=ENOENT", forkvm_script()]
    done = subprocess.run([*command, "verify", str(source), str(clone), "--json"], capture_output=True, text=True)

    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert (found["same"], [one["path"] for one in found["unread"]]) == (False, ["link"])


def test_hostile_names_are_escaped_and_special_files_do_not_hang_verify(run_forkvm: RunForkvm, fresh: Fresh) -> None:
    source, clone = forked_pair(fresh("xfs"), run_forkvm)
    hostile = os.path.join(os.fsencode(clone), b"\x1b[2J\xff\n")
    os.mkfifo(hostile)
    (clone / "disk").unlink()
    os.mkfifo(clone / "disk")

    done = run_forkvm("verify", source, clone, timeout=30)
    document = run_forkvm("verify", source, clone, "--json", timeout=30)

    assert done.returncode == 1
    assert "\x1b" not in done.stdout
    assert "\\x1b[2J\\udcff\\n: only in the clone: a fifo" in done.stdout.splitlines()
    assert "disk: a file in the source, a fifo in the clone" in done.stdout.splitlines()
    assert "\x1b[2J\udcff\n" in [one["path"] for one in json.loads(document.stdout)["differences"]]


def test_the_error_for_a_missing_clone_names_the_clone(run_forkvm: RunForkvm, fresh: Fresh) -> None:
    source, clone = forked_pair(fresh("xfs"), run_forkvm)

    done = run_forkvm("verify", source, clone / "nothing")

    assert done.returncode == 1
    assert done.stderr == f"forkvm: source_not_found: {clone}/nothing: the clone does not exist (ENOENT)\n"
