"""Filesystems and quotas that are really full: of data, of metadata, or for the manifest only."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tasks.copier.fork_spec import ForkResult
from tasks.copier.options import Limits
from tasks.copier.space import room
from tests.fixtures.filesystems import Fresh, SmallTmpfs
from tests.support.engine.child_processes import NOBODY, in_child
from tests.support.engine.forks import CHUNKED, INLINE, MIB, assert_alike, fork, leftovers
from tests.support.engine.local_campaigns import campaign, destinations
from tests.support.guests import make_sparse_file
from tests.support.requirements import require_command

#: Free space within a quota, in bytes.
_ALLOWED = 8 * MIB


@pytest.fixture
def source(fresh: Fresh) -> Path:
    """Small files, then more data than any quota here allows; names are long, so that the manifest takes space too."""
    source = fresh("ext4") / "source"
    (source / "small").mkdir(parents=True)
    for n in range(500):
        (source / "small" / (f"{n:03}-" + "n" * 200)).write_bytes(b"x" * 100)
    make_sparse_file(source / "disk.raw", 32 * MIB, 24 * MIB)
    for path in [source.parent, source, *source.rglob("*")]:
        os.chown(path, NOBODY, NOBODY)
    return source


@pytest.fixture
def quota_of_btrfs(fresh: Fresh) -> Iterator[Path]:
    """A subvolume whose quota group has a limit, which also applies to root."""
    btrfs = require_command("btrfs", "quotas of btrfs")
    directory = fresh("btrfs")
    volume = directory / "volume"
    for command in (
        ["quota", "enable", str(directory)],
        ["subvolume", "create", str(volume)],
        ["qgroup", "limit", str(_ALLOWED), str(volume)],
    ):
        subprocess.run([btrfs, *command], check=True, capture_output=True)
    os.chown(volume, NOBODY, NOBODY)
    yield volume
    for command in (["subvolume", "delete", str(volume)], ["quota", "disable", str(directory)]):
        subprocess.run([btrfs, *command], check=True, capture_output=True)


def _assert_out_of_room(result: ForkResult, workdir: Path, number: int) -> None:
    assert result["error"] is not None, "it succeeded"
    assert (result["error"]["code"], result["error"]["errno"]) == ("no_space", number)
    assert leftovers(workdir) == []
    assert list(workdir.iterdir()) == []


@contextmanager
def _filled(disk: Path, left: int) -> Iterator[Path]:
    """An empty directory on a disk with so many bytes free."""
    workdir, filler = disk / "workdir", disk / "filler"
    workdir.mkdir()
    with filler.open("wb") as file:
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        os.posix_fallocate(file.fileno(), 0, free - left)
    yield workdir
    shutil.rmtree(workdir)
    filler.unlink()


@pytest.mark.parametrize("limits", [INLINE, CHUNKED], ids=["inline", "chunked"])
def test_an_exceeded_quota_is_no_space_and_leaves_nothing(source: Path, quota_of_btrfs: Path, limits: Limits) -> None:
    workdir = quota_of_btrfs

    result = in_child(lambda: fork(source, workdir / "fork", limits=limits), user=NOBODY)

    _assert_out_of_room(result, workdir, errno.EDQUOT)
    fitting = source.parent / "fitting"
    fitting.mkdir()
    (fitting / "state").write_bytes(b"paused")
    assert in_child(lambda: fork(fitting, workdir / "fork"), user=NOBODY)["error"] is None


def test_a_disk_that_is_full_at_any_step_is_no_space_and_leaves_nothing(
    source: Path, small_tmpfs: SmallTmpfs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Free space from too little for the journal, through too little for the manifest, to too little for the data.

    It fills up while a fork is made, as with other writers: the check of free space before the fork cannot detect it.
    """
    monkeypatch.setattr(room, "free_bytes", lambda fd: None)
    outcomes = set()
    disk = small_tmpfs(64 * MIB)
    for left in (0, 4 << 10, 12 << 10, 24 << 10, 64 << 10, 128 << 10, 256 << 10, MIB, 3 * MIB, 9 * MIB, 40 * MIB):
        for limits in (INLINE, CHUNKED):
            with _filled(disk, left) as workdir:
                result = fork(source, workdir / "fork", limits=limits)
                if result["error"] is None:
                    assert_alike(source, workdir / "fork")
                else:
                    _assert_out_of_room(result, workdir, errno.ENOSPC)
                outcomes.add((result["status"], result["files"]["total"] > 0))

    assert outcomes == {("failed", False), ("failed", True), ("succeeded", True)}


def test_each_fork_of_a_campaign_on_a_full_disk_is_no_space_and_names_its_destination(
    fresh: Fresh, small_tmpfs: SmallTmpfs
) -> None:
    """Free space from too little for the plan, through too little for the outcome of a fork, to some forks."""
    source = fresh("ext4") / "source"
    source.mkdir()
    for n in range(20):
        (source / f"file-{n}").write_bytes(os.urandom(3 * n * 100))
    disk = small_tmpfs(4 * MIB)
    succeeded = set()
    for left in range(0, 320 << 10, 8 << 10):
        with _filled(disk, left) as workdir:
            result = campaign(source, destinations(workdir, 10))

            forks = result["forks"]
            assert (forks["succeeded"] + forks["failed"], leftovers(workdir)) == (10, [])
            assert len(list(workdir.iterdir())) == forks["succeeded"]
            for failure in result["failures"]:
                error = failure["error"]
                assert (error["code"], error["errno"]) == ("no_space", errno.ENOSPC), left
                assert f"{error['path']}/".startswith(f"{failure['destination']}/"), (left, error)
            succeeded.add(forks["succeeded"])

    assert {0, 1, 2} <= succeeded
