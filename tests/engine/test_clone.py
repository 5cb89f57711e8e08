"""A fork equals its source, entry by entry, on every filesystem and between filesystems."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tasks.copier.options import Limits
from tests.fixtures.filesystems import Fresh, Kind
from tests.support.engine.child_processes import in_child
from tests.support.engine.forks import CHUNKED, INLINE, MIB, assert_alike, forked, leftovers, times
from tests.support.extents import allocated_bytes, allocated_bytes_of_tree, data_extents
from tests.support.guests import SKIPPED_BY_DEFAULT, make_guest
from tests.support.sources import age, make_everything, make_images

PAIRS: list[tuple[Kind, Kind]] = [
    ("xfs", "btrfs"),
    ("btrfs", "ext4"),
    ("ext4", "xfs"),
    ("tmpfs", "xfs"),
    ("xfs", "tmpfs"),
    ("overlayfs", "ext4"),
    ("xfs_noreflink", "xfs"),
    ("btrfs", "overlayfs"),
]


def test_a_fork_equals_its_source(fs: Path, limits: Limits) -> None:
    source = make_everything(fs / "source")
    before = times(source)

    forked(source, fs / "fork", limits=limits)

    assert times(source) == before
    assert_alike(source, fs / "fork", SKIPPED_BY_DEFAULT)


@pytest.mark.parametrize(("source_kind", "destination_kind"), PAIRS)
def test_a_fork_on_another_filesystem_equals_its_source(
    fresh: Fresh, source_kind: Kind, destination_kind: Kind, limits: Limits
) -> None:
    source = make_everything(fresh(source_kind) / "source")
    destination = fresh(destination_kind) / "fork"
    before = times(source)

    result = forked(source, destination, limits=limits)

    assert times(source) == before
    assert_alike(source, destination, SKIPPED_BY_DEFAULT)
    assert result["files"]["reflinked"] == 0
    assert result["fallback"] is not None


def test_a_fork_takes_no_more_space_than_its_source(fs: Path, limits: Limits) -> None:
    source = fs / "source"
    source.mkdir()
    make_images(source)

    forked(source, fs / "fork", limits=limits, reflink="never")

    assert abs(allocated_bytes_of_tree(fs / "fork") - allocated_bytes_of_tree(source)) <= 8 * MIB
    for path in source.iterdir():
        clone = fs / "fork" / path.name
        assert clone.stat().st_size == path.stat().st_size
        assert allocated_bytes(clone) <= allocated_bytes(path) + MIB, path.name
    assert data_extents(fs / "fork" / "all-hole.raw") == []


def test_an_empty_source_is_forked(fs: Path, limits: Limits) -> None:
    (fs / "source").mkdir(mode=0o711)

    result = forked(fs / "source", fs / "fork", limits=limits)

    assert_alike(fs / "source", fs / "fork")
    assert set(result["files"].values()) == {0}
    assert result["chunks"] == 0


def test_access_times_are_preserved(fs: Path, limits: Limits) -> None:
    source = make_guest(fs / "source")
    (source / "link").symlink_to("state")
    for path in [*source.rglob("*"), source]:
        age(path)
    atimes = {path.relative_to(source): path.lstat().st_atime_ns for path in [*source.rglob("*"), source]}

    forked(source, fs / "fork", limits=limits, exclude=())

    for path, atime in atimes.items():
        if not path.name.endswith((".sock", ".socket")):
            assert (fs / "fork" / path).lstat().st_atime_ns == atime, path


def test_reading_a_source_changes_no_file_times(fs: Path, limits: Limits) -> None:
    """Without O_NOATIME, relatime would record the first read after a write."""
    source = make_guest(fs / "source")
    for path in source.rglob("*"):
        os.utime(path, ns=(1, 10**18))
    before = times(source)

    forked(source, fs / "fork", limits=limits, reflink="never")

    assert times(source) == before


def test_listing_a_source_changes_no_directory_times(fs: Path, limits: Limits) -> None:
    source = make_guest(fs / "source")
    directories = [source, *(path for path in source.rglob("*") if path.is_dir())]
    for path in directories:
        os.utime(path, ns=(1, 10**18))

    forked(source, fs / "fork", limits=limits)

    assert len(directories) > 2
    assert [path.stat().st_atime_ns for path in directories] == [1] * len(directories)


@pytest.mark.parametrize("umask", [0o000, 0o077, 0o777])
def test_the_umask_does_not_affect_a_fork(fs: Path, umask: int, limits: Limits) -> None:
    source = make_everything(fs / "source")

    in_child(lambda: forked(source, fs / "fork", limits=limits), umask=umask)

    assert_alike(source, fs / "fork", SKIPPED_BY_DEFAULT)


def test_a_tree_with_paths_longer_than_the_kernel_accepts_is_forked(fs: Path, limits: Limits) -> None:
    names = ["d" * 200] * 30
    make_deep(fs / "source", names)

    forked(fs / "source", fs / "fork", limits=limits)

    assert read_deep(fs / "fork", names) == (b"deep down", "to/somewhere", b"value")


def test_a_tree_of_a_thousand_levels_is_forked(fresh: Fresh) -> None:
    directory, names = fresh("xfs"), ["level"] * 1200
    make_deep(directory / "source", names)
    try:
        forked(directory / "source", directory / "fork", limits=CHUNKED)

        assert read_deep(directory / "fork", names) == (b"deep down", "to/somewhere", b"value")
    finally:
        # Deeper than shutil can recurse.
        subprocess.run(["rm", "-rf", directory / "source", directory / "fork"], check=True)


def make_deep(top: Path, names: list[str]) -> None:
    top.mkdir()
    here = os.open(top, os.O_RDONLY)
    for name in names:
        os.mkdir(name, dir_fd=here)
        here = _step(here, name)
    fd = os.open("file", os.O_WRONLY | os.O_CREAT, 0o640, dir_fd=here)
    os.write(fd, b"deep down")
    os.setxattr(fd, "user.depth", b"value")
    os.close(fd)
    os.link("file", "again", src_dir_fd=here, dst_dir_fd=here)
    os.symlink("to/somewhere", "link", dir_fd=here)
    os.close(here)


def read_deep(top: Path, names: list[str]) -> tuple[bytes, str, bytes]:
    """What `make_deep` wrote at the bottom: content, link target, attribute."""
    here = os.open(top, os.O_RDONLY)
    try:
        for name in names:
            here = _step(here, name)
        fd = os.open("file", os.O_RDONLY, dir_fd=here)
        with open(fd, "rb") as file:
            assert sorted(os.listdir(here)) == ["again", "file", "link"]
            assert os.stat("again", dir_fd=here).st_ino == os.fstat(fd).st_ino
            return file.read(), os.readlink("link", dir_fd=here), os.getxattr(fd, "user.depth")
    finally:
        os.close(here)


def _step(here: int, name: str) -> int:
    below = os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=here)
    os.close(here)
    return below


def test_a_hard_link_to_a_file_outside_the_source_becomes_a_separate_file(fs: Path) -> None:
    source = make_guest(fs / "source")
    os.link(source / "state", fs / "outside")

    forked(source, fs / "fork")

    assert (fs / "fork" / "state").stat().st_nlink == 1
    assert (fs / "outside").stat().st_nlink == 2


def test_a_directory_of_more_entries_than_one_block_is_forked(fresh: Fresh, limits: Limits) -> None:
    directory = fresh("xfs")
    source = directory / "source"
    source.mkdir()
    for number in range(4500):
        (source / f"{number}").write_bytes(b"%d" % number)

    result = forked(source, directory / "fork", limits=limits)

    assert result["files"]["total"] == result["files"]["reflinked"] == 4500
    assert_alike(source, directory / "fork")


def test_a_fork_of_a_fork_of_a_fork_equals_the_source(fs: Path) -> None:
    source = make_everything(fs / "source")

    forked(source, fs / "child")
    forked(fs / "child", fs / "grandchild", limits=CHUNKED)

    assert_alike(source, fs / "grandchild", SKIPPED_BY_DEFAULT)


def test_a_source_reached_through_a_symlink_is_forked_as_the_directory_it_is(fs: Path) -> None:
    source = make_guest(fs / "source")
    (fs / "current").symlink_to("source")

    forked(fs / "current", fs / "fork")

    assert not (fs / "fork").is_symlink()
    assert_alike(source, fs / "fork", SKIPPED_BY_DEFAULT)


def test_sockets_are_skipped_at_any_depth_and_with_any_name(fs: Path) -> None:
    source = make_guest(fs / "source")

    result = forked(source, fs / "fork", exclude=())

    assert result["files"]["skipped"] == 2
    assert_alike(source, fs / "fork", [b"vsock.sock", b"firecracker.socket"])


def test_parallel_forks_of_the_same_source_all_succeed(fs: Path) -> None:
    source = make_guest(fs / "source")

    for number in range(5):
        forked(source, fs / f"fork-{number}", fork_id=f"fork-{number}", limits=(INLINE, CHUNKED)[number % 2])

    for number in range(5):
        assert_alike(source, fs / f"fork-{number}", SKIPPED_BY_DEFAULT)
    assert leftovers(fs) == []


def test_a_file_from_the_far_future_is_forked(fresh: Fresh, limits: Limits) -> None:
    """tmpfs and btrfs store seconds in 64 bits; nanoseconds in 64 bits end in 2262."""
    directory = fresh("tmpfs")
    source = make_guest(directory / "source")
    os.utime(source / "state", ns=(15 * 10**18, 15 * 10**18))

    forked(source, directory / "fork", limits=limits)

    assert (directory / "fork" / "state").stat().st_mtime_ns == 15 * 10**18


def test_another_filesystem_that_is_mounted_within_the_source_is_forked_with_it(fresh: Fresh) -> None:
    directory = fresh("xfs")
    source = make_guest(directory / "source")
    (source / "mounted").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", source / "mounted"], check=True)
    try:
        (source / "mounted" / "file").write_bytes(b"x" * 10_000)
        os.link(source / "mounted" / "file", source / "mounted" / "again")

        result = forked(source, directory / "fork")

        assert_alike(source, directory / "fork", SKIPPED_BY_DEFAULT)
        assert result["files"]["copied"] == 1
        assert result["files"]["reflinked"] == 6
    finally:
        subprocess.run(["umount", source / "mounted"], check=True)
    shutil.rmtree(source / "mounted")
