"""A filesystem that reports every byte as data, although it stores holes: they are found by reading."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tasks.copier.errors import Code, ForkError
from tasks.copier.kernel.contents import first_difference
from tasks.copier.options import Limits
from tasks.copier.progress import Progress
from tests.fixtures.filesystems import Fresh, Kind
from tests.fixtures.fuse import Bindfs, Passthrough
from tests.support.engine.forks import CHUNKED, MIB, assert_alike, fork, fork_with_ledger, forked, leftovers
from tests.support.engine.local_campaigns import campaign_with_ledger, destinations
from tests.support.extents import allocated_bytes, data_extents
from tests.support.sources import make_images


@pytest.fixture
def images(fresh: Fresh, bindfs: Bindfs) -> tuple[Path, Path]:
    """A directory of sparse images, as bindfs shows it and as it is."""
    backing = fresh("ext4")
    (backing / "source").mkdir()
    make_images(backing / "source")
    shown = bindfs(backing) / "source"
    assert data_extents(shown / "all-hole.raw") == [(0, 64 * MIB + 1)]
    return shown, backing / "source"


def data_of(path: Path) -> int:
    return sum(end - start for start, end in data_extents(path))


@pytest.mark.parametrize(
    ("kind", "reflink"), [("xfs", "auto"), ("xfs", "never"), ("ext4", "auto"), ("btrfs", "auto"), ("tmpfs", "auto")]
)
def test_holes_stay_holes_and_the_totals_count_written_bytes(
    images: tuple[Path, Path], fresh: Fresh, kind: Kind, reflink: str, limits: Limits
) -> None:
    source, backing = images
    destination = fresh(kind) / "fork"

    ledger = fork_with_ledger(source, destination, limits=limits, reflink=reflink, verify="content")

    assert ledger.result["status"] == "succeeded", ledger.result["error"]
    assert_alike(source, destination)
    for name, result in ledger.files.items():
        clone = destination / name
        assert allocated_bytes(clone) <= allocated_bytes(backing / name) + MIB, name
        assert result["copied_bytes"] == data_of(clone), name
        assert result["copied_bytes"] <= data_of(backing / name), name
    assert data_extents(destination / "all-hole.raw") == []
    assert ledger.result["bytes"]["copied"] == sum(result["copied_bytes"] for result in ledger.files.values())
    assert leftovers(destination.parent) == []


def test_a_file_in_ranges_keeps_its_holes(fresh: Fresh, passthrough: Passthrough, tmp_path: Path) -> None:
    backing = fresh("ext4")
    (backing / "source").mkdir()
    with (backing / "source" / "disk.raw").open("wb") as disk:
        os.truncate(disk.fileno(), 200 * MIB)
        for at in (0, 50 * MIB, 199 * MIB):
            os.pwrite(disk.fileno(), os.urandom(MIB), at)
    source, destination = passthrough(backing) / "source", fresh("xfs") / "fork"

    ledger = fork_with_ledger(source, destination, limits=CHUNKED)

    assert ledger.result["chunks"] > 8  # the chunks follow from the size, since all bytes are read
    assert ledger.result["bytes"]["copied"] == 3 * MIB
    assert data_extents(destination / "disk.raw") == [(at * MIB, (at + 1) * MIB) for at in (0, 50, 199)]
    assert_alike(source, destination)


def test_a_file_without_holes_is_copied_with_its_zeros(fresh: Fresh, passthrough: Passthrough, limits: Limits) -> None:
    backing = fresh("ext4")
    (backing / "source").mkdir()
    (backing / "source" / "zeros.raw").write_bytes(bytes(3 * MIB))
    destination = fresh("xfs") / "fork"

    result = forked(passthrough(backing) / "source", destination, limits=limits)

    assert result["bytes"]["copied"] == 3 * MIB
    assert data_of(destination / "zeros.raw") == 3 * MIB


@pytest.mark.parametrize("reflink", ["auto", "never"])
def test_data_that_is_reported_as_a_hole_is_copied(
    fresh: Fresh, passthrough: Passthrough, limits: Limits, reflink: str
) -> None:
    """As a virtiofs of macOS does with every file (docker/sbx-releases issue 526)."""
    backing = fresh("ext4")
    (backing / "source").mkdir()
    (backing / "source" / "state").write_bytes(b"paused")
    make_images(backing / "source")
    for name in os.listdir(backing / "source"):
        if name != "all-hole.raw":
            with (backing / "source" / name).open("r+b") as file:
                file.write(b"first")
    source, destination = passthrough(backing, "hide_data") / "source", fresh("xfs") / "fork"
    assert data_extents(source / "state") == []

    result = forked(source, destination, limits=limits, reflink=reflink, verify="content")

    assert_alike(backing / "source", destination)
    assert result["bytes"]["copied"] == sum(map(data_of, destination.iterdir()))
    assert data_extents(destination / "all-hole.raw") == []


def test_a_comparison_finds_that_such_data_is_missing(fresh: Fresh, passthrough: Passthrough) -> None:
    backing = fresh("ext4")
    (backing / "disk.raw").write_bytes(b"data" * MIB)
    (backing / "hole.raw").touch()
    os.truncate(backing / "hole.raw", 4 * MIB)
    shown = passthrough(backing, "hide_data")
    fds = [os.open(path, os.O_RDONLY) for path in (shown / "disk.raw", backing / "hole.raw", backing / "disk.raw")]

    found = first_difference(fds[0], fds[1], 0, 4 * MIB), first_difference(fds[0], fds[2], 0, 4 * MIB)

    for fd in fds:
        os.close(fd)
    assert found == (0, None)


def test_a_campaign_preserves_the_holes_too(images: tuple[Path, Path], fresh: Fresh, tmp_path: Path) -> None:
    source, backing = images
    workdir = fresh("xfs")

    result, _ = campaign_with_ledger(source, destinations(workdir, 2), tmp_path / "ledger")

    assert result["status"] == "succeeded"
    for path in destinations(workdir, 2):
        assert_alike(source, path)
        for name in os.listdir(source):
            assert allocated_bytes(path / name) <= allocated_bytes(backing / name) + MIB, name
    assert result["bytes"]["copied"] <= 2 * sum(map(data_of, backing.iterdir()))


def test_reading_a_hole_ends_when_the_fork_is_cancelled(
    fresh: Fresh, passthrough: Passthrough, limits: Limits, every_poll: None
) -> None:
    backing = fresh("xfs")
    (backing / "source").mkdir()
    (backing / "source" / "disk.raw").touch()
    os.truncate(backing / "source" / "disk.raw", 1 << 62)
    destination = fresh("xfs") / "fork"
    seen: list[Progress] = []

    def cancel(progress: Progress) -> None:
        seen.append(progress.copy())
        if len(seen) > 20:
            raise ForkError(Code.CANCELLED, "enough", "")

    result = fork(passthrough(backing) / "source", destination, limits=limits, poll=cancel, reflink="never")

    assert result["status"] == "cancelled"
    assert "copy" in {progress["phase"] for progress in seen}
    assert not destination.exists()
    assert leftovers(destination.parent) == []
