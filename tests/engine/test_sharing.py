"""The extents that a fork shares with its source on disk, and those that it must not share."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from pathlib import Path

import pytest

from tasks.copier.options import Limits
from tests.fixtures.filesystems import Fresh, OverlayOver
from tests.support.engine.forks import CHUNKED, INLINE, MIB, assert_alike, fork, fork_with_ledger, forked
from tests.support.extents import allocated_bytes_of_tree, set_nocow, sharing
from tests.support.guests import GIB, SKIPPED_BY_DEFAULT, GuestSizes, make_guest, make_sparse_file
from tests.support.sources import make_everything
from tests.support.tree import content_sha256, snapshot

#: The manual test of the original program: an instance of 4 GiB, most of it holes.
INSTANCE = GuestSizes(overlay=2 * GIB, overlay_data=96 * MIB, memory=2 * GIB, memory_data=128 * MIB, config=MIB)
INSTANCE_DATA = 225 * MIB


def files_of(directory: Path) -> list[Path]:
    # os.walk, since rglob of Python 3.11.2 fails on a symlink whose target is too long to follow.
    paths = [Path(top, name) for top, _, names in os.walk(directory) for name in names]
    return sorted(path for path in paths if stat.S_ISREG(path.lstat().st_mode))


def assert_all_shared(directory: Path) -> None:
    for path in files_of(directory):
        found = sharing(path)
        # btrfs stores a tiny file in its metadata, so it has no extent to share.
        assert found.whole or path.stat().st_size <= 2048 or found.mapped == 0, path


def assert_none_shared(directory: Path) -> None:
    assert [path for path in files_of(directory) if sharing(path).shared] == []


def test_every_extent_of_a_fork_is_shared_with_its_source(reflink_fs: Path, limits: Limits) -> None:
    source = make_everything(reflink_fs / "source")

    result = forked(source, reflink_fs / "fork", limits=limits)

    assert_all_shared(reflink_fs / "fork")
    assert result["files"]["copied"] == 0
    assert result["files"]["reflinked"] > 40
    assert result["bytes"]["copied"] == 0
    assert result["bytes"]["reflinked"] == result["bytes"]["logical"] > 0
    assert result["fallback"] is None


def test_writing_to_a_fork_does_not_change_its_source(reflink_fs: Path, limits: Limits) -> None:
    source = make_guest(reflink_fs / "source")
    before = snapshot(source)
    forked(source, reflink_fs / "fork", limits=limits)
    clone = snapshot(reflink_fs / "fork")

    for path in files_of(reflink_fs / "fork"):
        with path.open("r+b") as file:
            for at in range(0, path.stat().st_size, MIB):
                os.pwrite(file.fileno(), b"the machine writes", at)
    os.sync()

    assert snapshot(source) == before
    written = snapshot(reflink_fs / "fork")
    assert all(written[path].sha256 != clone[path].sha256 for path in written if written[path].kind == "file")


def test_writing_to_a_source_does_not_change_its_fork(reflink_fs: Path) -> None:
    source = make_guest(reflink_fs / "source")
    forked(source, reflink_fs / "fork")
    before = snapshot(reflink_fs / "fork")

    for path in files_of(source):
        path.write_bytes(b"another life")

    assert snapshot(reflink_fs / "fork") == before


def test_a_fork_with_reflink_never_shares_no_extent(reflink_fs: Path, limits: Limits) -> None:
    source = make_everything(reflink_fs / "source")

    result = forked(source, reflink_fs / "fork", limits=limits, reflink="never")

    assert_alike(source, reflink_fs / "fork", SKIPPED_BY_DEFAULT)
    assert_none_shared(reflink_fs / "fork")
    assert_none_shared(source)
    assert result["files"]["reflinked"] == result["bytes"]["reflinked"] == 0
    assert 0 < result["bytes"]["copied"] < result["bytes"]["logical"]
    assert result["fallback"] is None  # nothing was refused


def test_one_nocow_file_is_copied_and_all_others_are_reflinked(fresh: Fresh, limits: Limits) -> None:
    """The original program applied the first refusal to the whole fork, and copied all bytes of all later files."""
    directory = fresh("btrfs")
    source = make_guest(directory / "source")
    nocow = source / "swap.raw"  # the largest, so it is tried first; neither first nor last by name
    nocow.touch()
    set_nocow(nocow)
    with nocow.open("r+b") as file:
        os.pwrite(file.fileno(), os.urandom(3 * MIB), 0)
        os.truncate(file.fileno(), 100 * MIB)

    ledger = fork_with_ledger(source, directory / "fork", limits=limits)

    assert_alike(source, directory / "fork", SKIPPED_BY_DEFAULT)
    methods = {path: one["method"] for path, one in ledger.files.items() if one["type"] == "file"}
    assert [path for path, method in methods.items() if method == "copy"] == ["swap.raw"]
    assert ledger.result["files"]["copied"] == 1
    assert ledger.result["files"]["reflinked"] == 6
    assert ledger.result["fallback"] == {
        "reason": "EINVAL: this file cannot be reflinked",
        "errno": errno.EINVAL,
        "path": "swap.raw",
    }
    assert sharing(directory / "fork" / "swap.raw").shared == 0
    nocow.unlink()
    (directory / "fork" / "swap.raw").unlink()
    assert_all_shared(directory / "fork")


def test_many_nocow_files_do_not_prevent_reflinks_of_other_files(fresh: Fresh, limits: Limits) -> None:
    directory = fresh("btrfs")
    source = make_guest(directory / "source")
    for number in range(12):
        nocow = source / f"nocow-{number}.raw"
        nocow.touch()
        set_nocow(nocow)
        with nocow.open("r+b") as file:
            os.pwrite(file.fileno(), os.urandom(MIB), 0)
            os.truncate(file.fileno(), 100 * MIB)

    result = forked(source, directory / "fork", limits=limits)

    assert_alike(source, directory / "fork", SKIPPED_BY_DEFAULT)
    for path in (directory / "fork").glob("nocow*"):
        assert sharing(path).shared == 0
        path.unlink()
    assert_all_shared(directory / "fork")
    if limits is INLINE:
        assert (result["files"]["copied"], result["files"]["reflinked"]) == (12, 6)


def test_on_overlayfs_a_reflink_is_tried_for_each_file(overlay_over: OverlayOver, fresh: Fresh, limits: Limits) -> None:
    """One st_dev, two filesystems below: a refusal is not valid for other files."""
    lower = fresh("ext4")
    make_guest(lower / "source")
    overlay = overlay_over(lower)
    source = overlay / "source"
    copied_up = source / "snapshots" / "snapshot-latest" / "memory"
    with copied_up.open("r+b") as file:
        file.write(b"copied up")
    os.sync()

    ledger = fork_with_ledger(source, overlay / "fork", limits=limits)

    assert_alike(source, overlay / "fork", SKIPPED_BY_DEFAULT)
    methods = {path: one["method"] for path, one in ledger.files.items() if one["type"] == "file"}
    assert [path for path, method in methods.items() if method == "reflink"] == ["snapshots/snapshot-latest/memory"]
    assert ledger.result["fallback"] is not None
    assert ledger.result["fallback"]["errno"] == errno.EXDEV


def test_a_pair_of_filesystems_that_refused_is_not_tried_again(fresh: Fresh, limits: Limits) -> None:
    source, destination = make_guest(fresh("xfs") / "source"), fresh("btrfs") / "fork"

    ledger = fork_with_ledger(source, destination, limits=limits)

    reasons = {one["reason"] for one in ledger.files.values() if one["method"] == "copy"}
    assert "EXDEV: this pair of filesystems refused a reflink before" in reasons
    assert ledger.result["fallback"] == {
        "reason": "EXDEV: this pair of filesystems cannot reflink",
        "errno": errno.EXDEV,
        "path": "overlay.raw",
    }


@pytest.mark.parametrize("kind", ["xfs_noreflink", "ext4", "tmpfs"])
def test_reflink_always_fails_on_filesystems_without_reflinks(kind: str, fresh: Fresh, limits: Limits) -> None:
    directory = fresh(kind)  # type: ignore[arg-type]
    source = make_guest(directory / "source")

    result = fork(source, directory / "fork", limits=limits, reflink="always")

    assert result["error"] is not None
    assert result["error"]["code"] == "reflink_unsupported"
    assert result["error"]["path"] == str(source / "overlay.raw")
    assert result["error"]["errno"] == errno.EOPNOTSUPP
    assert [path.name for path in directory.iterdir()] == ["source"]


def test_reflink_always_succeeds_if_every_file_can_be_reflinked(reflink_fs: Path, limits: Limits) -> None:
    source = make_guest(reflink_fs / "source")

    forked(source, reflink_fs / "fork", limits=limits, reflink="always")

    assert_all_shared(reflink_fs / "fork")


def test_reflink_always_requires_reflinks_for_regular_files_only(fresh: Fresh, limits: Limits) -> None:
    directory = fresh("ext4")
    (directory / "source" / "below").mkdir(parents=True)
    (directory / "source" / "link").symlink_to("below")

    forked(directory / "source", directory / "fork", limits=limits, reflink="always")

    assert_alike(directory / "source", directory / "fork")


def test_one_nocow_file_fails_a_fork_with_reflink_always(fresh: Fresh, limits: Limits) -> None:
    directory = fresh("btrfs")
    source = make_guest(directory / "source")
    (source / "nocow").touch()
    set_nocow(source / "nocow")
    (source / "nocow").write_bytes(b"x" * 5000)

    result = fork(source, directory / "fork", limits=limits, reflink="always")

    assert result["error"] is not None
    assert (result["error"]["code"], result["error"]["path"]) == ("reflink_unsupported", str(source / "nocow"))
    assert [path.name for path in directory.iterdir()] == ["source"]


def test_an_instance_of_4_gib_is_forked_on_xfs_with_every_extent_shared(fresh: Fresh) -> None:
    directory = fresh("xfs")
    source = make_guest(directory / "source", INSTANCE)
    os.sync()
    free = shutil.disk_usage(directory).free

    result = forked(source, directory / "fork")

    assert_alike(source, directory / "fork", SKIPPED_BY_DEFAULT)
    assert_all_shared(directory / "fork")
    assert result["bytes"]["logical"] == result["bytes"]["reflinked"] > 4 * GIB
    os.sync()
    assert free - shutil.disk_usage(directory).free < 8 * MIB
    assert result["seconds"]["total"] < 5  # not timed on a busy machine


@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_an_instance_of_4_gib_is_forked_by_the_sparse_copy(kind: str, fresh: Fresh) -> None:
    directory = fresh(kind)  # type: ignore[arg-type]
    source = make_guest(directory / "source", INSTANCE)

    result = forked(source, directory / "fork")

    assert_alike(source, directory / "fork", SKIPPED_BY_DEFAULT)
    assert abs(allocated_bytes_of_tree(directory / "fork") - allocated_bytes_of_tree(source)) <= 8 * MIB
    assert result["bytes"]["logical"] > 4 * GIB
    assert 0.8 * INSTANCE_DATA < result["bytes"]["copied"] <= 1.1 * INSTANCE_DATA
    assert result["chunks"] > 1
    assert result["seconds"]["total"] < 30


def test_ranges_copied_by_two_processes_make_one_complete_file(fs: Path) -> None:
    (fs / "source").mkdir()
    make_sparse_file(fs / "source" / "disk.raw", 64 * MIB + 12_345, 24 * MIB)

    result = forked(fs / "source", fs / "fork", limits=CHUNKED, reflink="never")

    assert result["chunks"] > 10
    assert content_sha256(fs / "fork" / "disk.raw") == content_sha256(fs / "source" / "disk.raw")
    assert_alike(fs / "source", fs / "fork")
