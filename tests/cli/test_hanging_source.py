"""A source on a filesystem that hangs: a second Ctrl-C ends a local command, and gc removes what it left."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.fixtures.filesystems import Fresh
from tests.fixtures.fuse import Passthrough
from tests.fixtures.processes import RunForkvm, forkvm_script, wait_until
from tests.support.engine.forks import MIB, leftovers

#: One file that is copied by the command itself, and one that its children copy in ranges.
SIZES = {"inline": 8 * MIB, "in ranges": 160 * MIB}


@pytest.fixture(params=SIZES)
def source(request: pytest.FixtureRequest, fresh: Fresh, passthrough: Passthrough) -> Path:
    backing = fresh("xfs")
    (backing / "source").mkdir()
    (backing / "source/disk").write_bytes(os.urandom(MIB) * (SIZES[request.param] // MIB))
    return passthrough(backing) / "source"


@contextmanager
def hanging(mount: Path) -> Iterator[None]:
    """Stop the FUSE daemon of a mount point: each call waits that needs it."""
    (daemon,) = (
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if str(mount).encode() in path.read_bytes().split(b"\0")
    )
    os.kill(daemon, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(daemon, signal.SIGCONT)


def waits_for_the_daemon(pid: int) -> bool:
    """Whether the process, or a child of it, waits in the kernel for a read."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    places = [Path(f"/proc/{each}/wchan").read_text() for each in (pid, *children)]
    return any(word in place for place in places for word in ("folio", "fuse", "request_wait"))


@pytest.mark.parametrize("command", ["fork", "campaign"])
def test_a_second_ctrl_c_ends_a_command_whose_source_hangs(
    run_forkvm: RunForkvm, fresh: Fresh, source: Path, command: str
) -> None:
    # Given a local job that waits for its source in the middle of a copy
    workdir = fresh("ext4")
    where = [workdir / "fork"] if command == "fork" else ["--to", workdir / "vm-{n}", "--count", "2", "--local"]
    process = subprocess.Popen(
        [forkvm_script(), command, source, *where],
        env={**os.environ, "FORKVM_COPY_RATE": "4000000"},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    wait_until(lambda: any(workdir.glob(".forkvm-*.*/disk")), "a copy")
    with hanging(source.parent):
        wait_until(lambda: waits_for_the_daemon(process.pid), "a read that hangs")

        # When
        process.send_signal(signal.SIGINT)
        status = Path(f"/proc/{process.pid}/status")
        wait_until(lambda: "ShdPnd:\t0000000000000000" in status.read_text(), "the first one is taken")
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=30)

        # Then
        assert process.returncode == 130
        assert time.monotonic() - began < 5
        assert "ended by a second signal" in stderr
    wait_until(lambda: run_forkvm("gc", workdir).returncode == 0 and leftovers(workdir) == [], "an empty directory")
    assert list(workdir.iterdir()) == []
