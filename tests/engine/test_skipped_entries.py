"""Entries that a fork leaves out neither fail it nor its comparison, whatever becomes of them meanwhile."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tasks.copier.clone.compare import compare
from tasks.copier.options import DEFAULT_EXCLUDE, Limits
from tasks.copier.source.selection import Selection
from tasks.copier.source.walk import BLOCK_ENTRIES, Walk
from tests.fixtures.filesystems import Fresh, unmount
from tests.fixtures.processes import ended_at_exit, wait_until
from tests.support.engine.forks import fork_with_ledger, leftovers, refused
from tests.support.engine.local_campaigns import campaign_with_ledger, destinations
from tests.support.guests import make_guest
from tests.support.requirements import require_command


@pytest.mark.parametrize("kind", [stat.S_IFREG, stat.S_IFSOCK])
def test_they_may_be_removed_between_their_listing_and_the_look_at_them(fresh: Fresh, kind: int) -> None:
    """The kernel lists some hundred names at a time, so the names that follow a block were listed before it."""
    source = fresh("xfs") / "source"
    source.mkdir()
    names = [f"{number}.{'zst.tmp' if kind == stat.S_IFREG else 'socket'}" for number in range(2 * BLOCK_ENTRIES)]
    for name in names:
        os.mknod(source / name, kind | 0o600)

    def remove_all() -> None:
        for name in names:
            with suppress(FileNotFoundError):
                os.unlink(source / name)

    source_fd = os.open(source, os.O_RDONLY)
    walk = Walk(source_fd, str(source), Selection((), DEFAULT_EXCLUDE), hardlinks=True, checkpoint=lambda: None)
    blocks = walk.read("")
    found = [entry.name for entry in next(blocks).entries]

    remove_all()
    found += [entry.name for block in blocks for entry in block.entries]

    os.close(source_fd)
    assert found == [name for name in found if name in names]
    assert BLOCK_ENTRIES <= len(found) < len(names)


@pytest.fixture
def unreachable(fresh: Fresh) -> Iterator[Path]:
    """A guest in which the FUSE filesystem that is mounted at `share` has lost its daemon (ENOTCONN)."""
    source = make_guest(fresh("xfs") / "source")
    point, backing = source / "share", source.parent / "backing"
    point.mkdir()
    backing.mkdir()
    bindfs = require_command("bindfs", "a mount that cannot be reached")
    with ended_at_exit(subprocess.Popen([bindfs, "-f", backing, point])) as daemon:
        wait_until(lambda: os.path.ismount(point), "bindfs is mounted")
        daemon.kill()
        daemon.wait()
        wait_until(lambda: not os.path.ismount(point), "its status is not cached any more")
    try:
        yield source
    finally:
        unmount(point)


def test_they_may_be_unreachable(unreachable: Path, limits: Limits) -> None:
    destination = unreachable.parent / "fork"

    ledger = fork_with_ledger(unreachable, destination, limits=limits, skip=["share"])

    assert ledger.result["status"] == "succeeded", ledger.result["error"]
    assert ledger.files["share"]["reason"] == "skip"
    assert ledger.files["share"]["type"] == "directory"
    assert len(ledger.files) == ledger.result["files"]["total"]
    assert not (destination / "share").exists()
    assert leftovers(destination.parent) == []


def test_a_campaign_leaves_them_out_too(unreachable: Path, tmp_path: Path) -> None:
    forks = destinations(unreachable.parent, 2)

    result, _ = campaign_with_ledger(unreachable, forks, tmp_path / "ledger", skip=["share"])

    assert result["status"] == "succeeded"
    assert all((path / "overlay.raw").exists() for path in forks)


def test_a_comparison_leaves_them_out_too(unreachable: Path) -> None:
    fork_with_ledger(unreachable, unreachable.parent / "fork", skip=["share"])
    source_fd, clone_fd = os.open(unreachable, os.O_RDONLY), os.open(unreachable.parent / "fork", os.O_RDONLY)

    with_share = compare(source_fd, clone_fd, Selection((), DEFAULT_EXCLUDE))
    without = compare(source_fd, clone_fd, Selection(("share",), DEFAULT_EXCLUDE))

    os.close(source_fd)
    os.close(clone_fd)
    assert without.same
    assert [finding.path for finding in with_share.unread.first] == ["share"]


def test_an_unreachable_entry_that_is_not_left_out_fails_the_fork(unreachable: Path) -> None:
    error = refused(unreachable, unreachable.parent / "fork")

    assert error["code"] == "io_error"
    assert error["path"] == str(unreachable / "share")
