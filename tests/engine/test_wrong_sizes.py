"""Files with more data than their filesystem reports (procfs, FUSE with direct_io): none of it is lost silently."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tasks.copier.clone.compare import Comparison, compare
from tasks.copier.options import Limits
from tasks.copier.source.selection import Selection
from tests.fixtures.filesystems import Fresh, Kind, unmount
from tests.fixtures.fuse import Passthrough
from tests.support.engine.forks import MIB, assert_alike, forked, refused
from tests.support.engine.local_campaigns import campaign, destinations


@pytest.fixture
def proc_file(fresh: Fresh) -> Path:
    """A source with a file of procfs: it reports 0 bytes, and a read returns some."""
    source = fresh("xfs") / "source"
    source.mkdir()
    (source / "data").write_text("data")
    (source / "empty").touch()
    (source / "version").touch()
    return source


@contextmanager
def _procfs_at(point: Path) -> Iterator[None]:
    subprocess.run(["mount", "--bind", "/proc/version", point], check=True)
    try:
        yield
    finally:
        unmount(point)


@pytest.mark.parametrize("kind", ["xfs", "ext4"])
def test_a_file_of_procfs_fails_the_fork(proc_file: Path, fresh: Fresh, kind: Kind, limits: Limits) -> None:
    destination = fresh(kind) / "fork"
    with _procfs_at(proc_file / "version"):
        error = refused(proc_file, destination, limits=limits)

    assert (error["code"], error["path"]) == ("io_error", str(proc_file / "version"))
    assert "more data than the 0 bytes" in error["message"]
    assert "skip" in error["message"]


def test_a_file_of_procfs_can_be_left_out(proc_file: Path, fresh: Fresh) -> None:
    destination = fresh("xfs") / "fork"
    with _procfs_at(proc_file / "version"):
        forked(proc_file, destination, skip=["version"])

    assert_alike(proc_file, destination, left_out=[b"version"])


def test_a_file_of_procfs_fails_each_fork_of_a_campaign(proc_file: Path, fresh: Fresh) -> None:
    paths = destinations(fresh("ext4"), 3)
    with _procfs_at(proc_file / "version"):
        result = campaign(proc_file, paths)

    assert result["forks"]["succeeded"] == 0
    assert {failure["error"]["path"] for failure in result["failures"]} == {str(proc_file / "version")}


@pytest.mark.parametrize("size", [1, 8 * MIB])
@pytest.mark.parametrize("verify", ["none", "content"])
def test_a_file_with_data_past_its_reported_size_fails_the_fork(
    fresh: Fresh, passthrough: Passthrough, limits: Limits, size: int, verify: str
) -> None:
    backing = fresh("ext4")
    (backing / "source").mkdir()
    (backing / "source/disk").write_bytes(os.urandom(size))
    source = passthrough(backing, "understate") / "source"
    assert (source / "disk").stat().st_size == size // 2

    error = refused(source, fresh("xfs") / "fork", limits=limits, verify=verify)

    assert (error["code"], error["path"]) == ("io_error", str(source / "disk"))


def test_verify_reports_data_past_a_reported_size(proc_file: Path, fresh: Fresh) -> None:
    clone = fresh("xfs") / "clone"
    forked(proc_file, clone)
    with _procfs_at(proc_file / "version"):
        os.utime(clone / "version", ns=(0, (proc_file / "version").stat().st_mtime_ns))
        os.chmod(clone / "version", 0o444)
        found = _compared(proc_file, clone)

    assert not found.same
    assert [(path, "0 bytes" in what) for path, what in found.unread.first] == [("version", True)]


def _compared(source: Path, clone: Path) -> Comparison:
    source_fd, clone_fd = os.open(source, os.O_RDONLY), os.open(clone, os.O_RDONLY)
    try:
        return compare(source_fd, clone_fd, Selection((), ()))
    finally:
        os.close(source_fd)
        os.close(clone_fd)
