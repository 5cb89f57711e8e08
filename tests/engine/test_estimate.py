"""`estimate` reports what a fork would do, and leaves nothing: method and bytes equal those of the later fork."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from tasks.copier.errors import Code, ForkError
from tasks.copier.estimate import surprises
from tasks.copier.estimate.estimate import Estimate, estimate
from tasks.copier.kernel import free_space
from tasks.copier.roots import Roots
from tasks.copier.space import reservation
from tests.fixtures.filesystems import Fresh, Kind, OverlayOver, SmallExt4, SmallTmpfs, make_subvolume
from tests.fixtures.fuse import Passthrough
from tests.support.engine.forks import INLINE, MIB, fork, forked, leftovers, never_stop, spec_of
from tests.support.extents import set_nocow
from tests.support.guests import make_guest, make_slow_file, make_sparse_file
from tests.support.sources import make_links

_METHODS: Mapping[Kind, str] = {
    "xfs": "reflink",
    "xfs_noreflink": "copy",
    "btrfs": "reflink",
    "ext4": "copy",
    "tmpfs": "copy",
    "overlayfs": "reflink",
}


def _estimate(source: Path, destination: Path, **options: object) -> Estimate:
    """Make an estimate, which must leave nothing."""
    before = sorted(os.listdir(destination.parent))
    found = estimate(spec_of(source, destination, "estimate-1", **options), Roots(), INLINE, never_stop)
    assert sorted(os.listdir(destination.parent)) == before
    assert leftovers(destination.parent) == []
    return found


def _codes(found: Estimate) -> list[str]:
    return [warning["code"] for warning in found["warnings"]]


def _assert_true(found: Estimate, source: Path, destination: Path, **options: object) -> None:
    """The fork made afterwards matches the estimate."""
    result = forked(source, destination, **options)
    files = result["files"]
    by_files = "mixed" if files["copied"] and files["reflinked"] else "copy" if files["copied"] else "reflink"
    assert found["method"] == ("snapshot" if result["subvolume"] else by_files)
    assert found["bytes"]["logical"] == result["bytes"]["logical"]
    assert found["bytes"]["to_copy"] == result["bytes"]["copied"]
    assert found["entries"] == files["total"]
    assert found["files"] == files["copied"] + files["reflinked"]


def test_method_and_bytes_are_those_of_the_fork(fs: Path, fs_kind: Kind) -> None:
    source = make_guest(fs / "source")
    make_sparse_file(source / "no-hole.raw", 2 * MIB + 7, 4 * MIB)

    found = _estimate(source, fs / "fork")

    assert (found["method"], found["fits"]) == (_METHODS[fs_kind], True)
    assert (found["reason"] is None) == (found["method"] == "reflink")
    assert ("full_copy" in _codes(found)) == (found["method"] == "copy")
    assert 0 < found["seconds"]["low"] < found["seconds"]["high"]
    assert found["bytes"]["allocated"] > 0
    assert found["extents"] > found["files"] - 1
    _assert_true(found, source, fs / "fork")


def test_a_subvolume_is_a_snapshot_and_the_snapshot_is_removed(fresh: Fresh) -> None:
    directory = fresh("btrfs")
    source = make_guest(make_subvolume(directory / "source"))

    found = _estimate(source, directory / "fork")
    by_files = _estimate(source, directory / "fork", snapshot="never")

    assert (found["method"], found["bytes"]["to_copy"], by_files["method"]) == ("snapshot", 0, "reflink")
    assert found["bytes"] == by_files["bytes"]
    _assert_true(found, source, directory / "fork")


def test_some_nocow_files_are_copied(fresh: Fresh) -> None:
    directory = fresh("btrfs")
    source = make_guest(directory / "source")
    (source / "nocow").touch()
    set_nocow(source / "nocow")
    (source / "nocow").write_bytes(b"x" * 5000)

    found = _estimate(source, directory / "fork", max_copied_bytes=4096)

    assert (found["method"], found["bytes"]["to_copy"]) == ("mixed", 5000)
    assert _codes(found) == ["copied_files", "over_budget"]
    assert "'nocow'" in found["warnings"][0]["message"]
    _assert_true(found, source, directory / "fork")


def test_another_filesystem_and_no_reflinks_are_full_copies_with_their_reasons(fresh: Fresh) -> None:
    source = make_guest(fresh("xfs") / "source")

    other, never = fresh("btrfs") / "fork", source.parent / "fork"
    reasons = [_estimate(source, other)["reason"], _estimate(source, never, reflink="never")["reason"]]

    assert [str(reason).split(":")[0] for reason in reasons] == ["EXDEV", "reflink=never"]
    _assert_true(_estimate(source, other), source, other)


def test_a_lower_layer_that_cannot_reflink_is_a_copy(fresh: Fresh, overlay_over: OverlayOver) -> None:
    lower = fresh("ext4")
    make_guest(lower / "source")
    overlay = overlay_over(lower)

    _assert_true(_estimate(overlay / "source", overlay / "fork"), overlay / "source", overlay / "fork")


def test_many_extents_outside_links_and_open_files_are_reported(fresh: Fresh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surprises, "MANY_EXTENTS", 1_000)
    directory = fresh("xfs")
    source = directory / "source"
    source.mkdir()
    make_links(source)
    make_slow_file(source / "fragmented", extents=1_200)
    (source / "outside").write_bytes(b"x")
    os.link(source / "outside", directory / "second-name")

    with (source / "outside").open("r+b"):
        found = _estimate(source, directory / "fork")
    closed = _estimate(source, directory / "fork")

    assert _codes(found) == ["many_extents", "source_open", "outside_links"]
    assert _codes(closed) == ["many_extents", "outside_links"]
    assert "'outside'" in found["warnings"][2]["message"]
    assert found["extents"] > 1_200
    _assert_true(closed, source, directory / "fork")


def test_a_fork_that_does_not_fit_is_reported_with_both_sizes(
    fresh: Fresh, small_tmpfs: SmallTmpfs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reservation, "DIRECTORY", str(tmp_path))
    source, workdir = make_guest(fresh("ext4") / "source"), small_tmpfs(8 * MIB)
    fitting = small_tmpfs(32 * MIB)
    fd = os.open(fitting, os.O_RDONLY)
    held = reservation.reserve("1-2", free_space.filesystem_id(fd), 24 * MIB, is_queued=False)
    os.close(fd)

    small, shared = _estimate(source, workdir / "fork"), _estimate(source, fitting / "fork")
    assert held is not None
    held.close()
    alone = _estimate(source, fitting / "fork")

    assert [found["fits"] for found in (small, shared, alone)] == [False, False, True]
    assert [("no_space" in _codes(found)) for found in (small, shared, alone)] == [True, True, False]
    message = next(warning["message"] for warning in small["warnings"] if warning["code"] == "no_space")
    assert str(small["bytes"]["to_copy"]) in message
    assert str(small["free_bytes"]) in message


def test_too_few_inodes_are_reported(fresh: Fresh, small_tmpfs: SmallTmpfs) -> None:
    source, workdir = make_guest(fresh("ext4") / "source"), small_tmpfs(64 * MIB)
    for number in range(20):
        (source / f"disk-{number}.raw").write_bytes(b"x")
    _leave_inodes(workdir, 25)

    found = _estimate(source, workdir / "fork")

    assert "no_inodes" in _codes(found)
    assert not found["fits"]


def test_hard_links_and_skipped_entries_need_no_inodes(fresh: Fresh, small_ext4: SmallExt4) -> None:
    source, workdir = _many_names(fresh("xfs") / "source"), small_ext4("-N", "64")
    assert os.statvfs(workdir).f_favail < 100

    found = _estimate(source, workdir / "fork")

    assert found["fits"]
    assert "no_inodes" not in _codes(found)
    _assert_true(found, source, workdir / "fork")


def test_a_hard_link_on_tmpfs_needs_an_inode(fresh: Fresh, small_tmpfs: SmallTmpfs) -> None:
    source, workdir = _many_names(fresh("ext4") / "source"), small_tmpfs(64 * MIB)
    _leave_inodes(workdir, 40)

    found = _estimate(source, workdir / "fork")

    assert "no_inodes" in _codes(found)
    error = fork(source, workdir / "fork")["error"]
    assert error is not None
    assert error["code"] == Code.NO_SPACE


def _many_names(source: Path) -> Path:
    """A source with one file, 50 hard links to it and 50 entries that are skipped."""
    source.mkdir()
    (source / "disk.raw").write_bytes(b"x")
    for number in range(50):
        (source / f"name-{number}").hardlink_to(source / "disk.raw")
        (source / f"{number}.sock").write_bytes(b"")
    return source


def _leave_inodes(tmpfs: Path, number: int) -> None:
    status = os.statvfs(tmpfs)
    options = f"remount,nr_inodes={status.f_files - status.f_favail + number}"
    subprocess.run(["mount", "-o", options, str(tmpfs)], check=True)


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda source: os.mkfifo(source / "fifo"), Code.UNSUPPORTED_FILE_TYPE),
        (lambda source: (source.parent / "fork").mkdir(), Code.DESTINATION_EXISTS),
        (lambda source: source.rename(source.parent / "gone"), Code.SOURCE_NOT_FOUND),
    ],
)
def test_errors_of_the_fork_fail_the_estimate(fresh: Fresh, make: object, code: Code) -> None:
    directory = fresh("xfs")
    source = make_guest(directory / "source")
    make(source)  # type: ignore[operator]

    with pytest.raises(ForkError) as raised:
        _estimate(source, directory / "fork")

    assert raised.value.code is code
    assert leftovers(directory) == []


def test_reflinks_that_are_required_and_refused_fail_the_estimate(fresh: Fresh) -> None:
    directory = fresh("ext4")

    with pytest.raises(ForkError) as raised:
        _estimate(make_guest(directory / "source"), directory / "fork", reflink="always")

    assert raised.value.code is Code.REFLINK_UNSUPPORTED
    assert leftovers(directory) == []


def test_one_copy_of_a_fragmented_template_makes_later_forks_cheap(reflink_fs: Path) -> None:
    """The procedure in docs/reflink.md: FICLONE takes time for each extent, and a copy has few extents."""
    # Given a template that was forked, and then ran and wrote every other block of its image
    template = reflink_fs / "template"
    template.mkdir()
    make_sparse_file(template / "disk.raw", 16 * MIB, 16 * MIB)
    forked(template, reflink_fs / "vm-0")
    _write_every_other_block(template / "disk.raw")
    fragmented = _estimate(template, reflink_fs / "vm-1")

    # When it is copied once
    copied = forked(template, reflink_fs / "compact", reflink="never")
    compact = _estimate(reflink_fs / "compact", reflink_fs / "vm-1")

    # Then later forks share the same data with a small fraction of the extents
    assert (fragmented["extents"] >= 2_000, fragmented["method"]) == (True, "reflink")
    assert copied["bytes"]["copied"] == fragmented["bytes"]["logical"]
    assert (compact["extents"] <= 200, compact["method"]) == (True, "reflink")
    assert compact["bytes"]["logical"] == fragmented["bytes"]["logical"]
    assert forked(reflink_fs / "compact", reflink_fs / "vm-1")["bytes"]["copied"] == 0


def _write_every_other_block(path: Path) -> None:
    with path.open("r+b") as file:
        for at in range(0, path.stat().st_size, 8192):
            os.pwrite(file.fileno(), b"y" * 4096, at)
        os.fsync(file.fileno())


def test_an_estimate_on_a_full_filesystem_leaves_nothing(fresh: Fresh, small_tmpfs: SmallTmpfs) -> None:
    source, full = make_guest(fresh("xfs") / "source"), small_tmpfs(MIB)
    (full / "parent").mkdir()
    with (full / "filler").open("wb") as filler:
        status = os.statvfs(full)
        os.posix_fallocate(filler.fileno(), 0, status.f_bavail * status.f_frsize)

    with pytest.raises(ForkError) as caught:
        estimate(spec_of(source, full / "parent" / "b", "estimate-1"), Roots(), INLINE, never_stop)

    assert caught.value.code is Code.NO_SPACE
    assert leftovers(full / "parent") == []


def test_an_estimate_fails_as_the_fork_would_if_the_source_must_not_be_open(fresh: Fresh) -> None:
    directory = fresh("xfs")
    source = make_guest(directory / "source")

    with (source / "overlay.raw").open("r+b"), pytest.raises(ForkError) as caught:
        _estimate(source, directory / "fork", source_open="refuse")

    assert caught.value.code is Code.SOURCE_IN_USE
    assert _estimate(source, directory / "fork", source_open="refuse")["method"] == "reflink"


def test_an_estimate_tells_that_a_source_cannot_be_guarded(fresh: Fresh, passthrough: Passthrough) -> None:
    source = make_guest(passthrough(fresh("xfs")) / "source")

    with pytest.raises(ForkError) as caught:
        estimate(spec_of(source, fresh("xfs") / "b", "e", source_open="refuse"), Roots(), INLINE, never_stop)

    assert caught.value.code is Code.SOURCE_OPEN_UNSUPPORTED
