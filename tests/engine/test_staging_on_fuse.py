"""Files of the staging that another process removes while they are open, where the filesystem then reports ESTALE."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tasks.copier.kernel import syscalls
from tasks.copier.staging import proof
from tasks.copier.staging.staging import Staging
from tests.fixtures.filesystems import Fresh
from tests.fixtures.fuse import Bindfs, Passthrough
from tests.support.engine.forks import refused
from tests.support.engine.local_campaigns import campaign, destinations
from tests.support.guests import make_guest


def test_a_chunk_whose_lock_file_was_removed_on_fuse_is_started_again(
    passthrough: Passthrough, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FUSE and NFS report ESTALE for the status of an open file that was removed."""
    (tmp_path / "backing").mkdir()
    parent = os.open(passthrough(tmp_path / "backing"), os.O_RDONLY)
    open_proved = proof.open_file
    removals: list[str] = []

    def remove_then_fstat(fd: int) -> os.stat_result:
        if removals:
            os.unlink(removals.pop(), dir_fd=staging.fd)
        return fstat(fd)

    def opened_and_removed(dir_fd: int, name: str, flags: int) -> int:
        if name == "chunk-3" and flags == os.O_RDWR:
            removals.append(name)
        return open_proved(dir_fd, name, flags)

    fstat = syscalls.fstat
    monkeypatch.setattr(syscalls, "fstat", remove_then_fstat)
    monkeypatch.setattr(proof, "open_file", opened_and_removed)
    try:
        with Staging.claim(parent, "fork-1", wait=0) as staging:
            os.close(staging.create_file("chunk-3"))
            with staging.hold_chunk(3) as begun:
                assert begun == 1
                assert staging.has_file("chunk-3")
            staging.forget_chunk(3)
            staging.remove()
    finally:
        os.close(parent)


def test_a_staging_that_was_removed_on_fuse_is_no_longer_current(passthrough: Passthrough, tmp_path: Path) -> None:
    (tmp_path / "backing").mkdir()
    parent = os.open(passthrough(tmp_path / "backing"), os.O_RDONLY)
    try:
        with Staging.claim(parent, "fork-1", wait=0) as staging, Staging.peek(parent, "fork-1") as other:
            assert other is not None
            staging.remove()
            assert not other.is_current()
            with pytest.raises(FileNotFoundError):
                other.heartbeat()
    finally:
        os.close(parent)


def test_a_filesystem_that_shows_another_owner_is_refused_and_nothing_is_left(fresh: Fresh, bindfs: Bindfs) -> None:
    backing = fresh("xfs")
    source = make_guest(fresh("xfs") / "source")
    shown = bindfs(backing, "--force-user=nobody")

    for _ in range(2):
        error = refused(source, shown / "fork")

        assert (error["code"], error["path"]) == ("io_error", str(shown))
        assert "the user 65534" in error["message"]
    result = campaign(source, destinations(shown, 2))

    assert result["forks"]["failed"] == 2
    assert list(backing.iterdir()) == []
