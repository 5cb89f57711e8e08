"""A source file on which another process has a write lease, as Samba and nfsd take them for their clients."""

from __future__ import annotations

import fcntl
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event

import pytest

from tests.fixtures.filesystems import Fresh, Kind
from tests.fixtures.processes import wait_until
from tests.support.engine.child_processes import Child
from tests.support.engine.forks import assert_alike, forked

#: How long the holder takes to give its lease up, in seconds.
_TAKES = 0.05


@contextmanager
def _leased(path: Path) -> Iterator[None]:
    """Another process has a write lease on `path`, and gives it up when the kernel asks for it."""
    ready = path.parent.parent / "ready"

    def hold() -> bool:
        fd, asked = os.open(path, os.O_RDWR), Event()
        signal.signal(signal.SIGIO, lambda *_: asked.set())
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        ready.touch()
        was_asked = asked.wait(30)
        Event().wait(_TAKES)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        return was_asked

    holder = Child(hold)
    wait_until(ready.exists, "the lease")
    yield
    assert holder.result()  # the lease was asked for


@pytest.mark.parametrize("kind", ["xfs", "ext4"])
@pytest.mark.parametrize("verify", ["none", "content"])
def test_the_fork_waits_until_the_lease_is_given_up(fresh: Fresh, kind: Kind, verify: str) -> None:
    directory = fresh(kind)
    (directory / "a").mkdir()
    (directory / "a" / "disk").write_bytes(os.urandom(100_000))

    with _leased(directory / "a" / "disk"):
        forked(directory / "a", directory / "b", verify=verify)

    assert_alike(directory / "a", directory / "b")
