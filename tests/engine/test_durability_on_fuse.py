"""`durability: sync` on FUSE, where syncfs(2) reaches no daemon: each file is synced."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fixtures.filesystems import Fresh
from tests.fixtures.fuse import Passthrough
from tests.support.engine.traced_forks import trace_fork
from tests.support.requirements import require_command


@pytest.mark.parametrize("chunked", [False, True])
def test_each_file_and_directory_is_synced_before_the_fork_is_published(
    fresh: Fresh, passthrough: Passthrough, chunked: bool
) -> None:
    strace = require_command("strace", "the order of system calls")
    source, mount = fresh("xfs") / "source", passthrough(fresh("xfs"))
    (source / "directory").mkdir(parents=True)
    for name in ("disk", "directory/state"):
        (source / name).write_bytes(b"x" * 5000)
    (source / "link").symlink_to("disk")

    traced = trace_fork(
        strace, source, mount / "fork", calls="syncfs,fsync,renameat2", chunked=chunked, durability="sync"
    )

    lines = [line for line in traced.trace if "fsync(" in line or '"fork"' in line]
    synced = [Path(line.partition("<")[2].partition(">")[0]).name for line in lines]
    published = next(at for at, line in enumerate(lines) if '"fork"' in line)
    assert {"disk", "state", "directory"} <= set(synced[:published])
