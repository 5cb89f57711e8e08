"""Bad input fails with its own code and the path. Nothing is left behind, and the next fork succeeds."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tasks.copier.options import Limits
from tests.fixtures.filesystems import Fresh, SmallTmpfs
from tests.support.engine.forks import CHUNKED, MIB, assert_alike, fork, forked, leftovers, refused
from tests.support.guests import SKIPPED_BY_DEFAULT, make_guest, make_sparse_file
from tests.support.tree import Entry, snapshot


@pytest.fixture
def yard(fresh: Fresh) -> Iterator[Path]:
    """A directory with a source. After each test nothing else is left in it, and the next fork succeeds."""
    directory = fresh("xfs")
    source = make_guest(directory / "source")
    before = files_of(source)
    yield directory
    assert leftovers(directory) == []
    forked(source, directory / "the next one")
    assert files_of(source) == before


def files_of(source: Path) -> dict[bytes, Entry]:
    return {path: entry for path, entry in snapshot(source).items() if entry.kind != "directory"}


def test_a_source_that_is_missing(yard: Path) -> None:
    error = refused(yard / "none", yard / "fork")

    assert (error["code"], error["path"]) == ("source_not_found", str(yard / "none"))


@pytest.mark.parametrize("path", ["file", "file/below", "dangling"])
def test_a_source_that_is_no_directory(yard: Path, path: str) -> None:
    (yard / "file").touch()
    (yard / "dangling").symlink_to("none")

    error = refused(yard / path, yard / "fork")

    code = "source_not_found" if path == "dangling" else "source_not_directory"
    assert (error["code"], error["path"]) == (code, str(yard / path))


@pytest.mark.parametrize(
    "path",
    ["relative", "", "{yard}/../{name}/fork", "{yard}/none/fork", "{yard}/source/state/fork", "{yard}/" + "n" * 256],
)
def test_an_invalid_destination_path(yard: Path, path: str) -> None:
    path = path.format(yard=yard, name=yard.name)

    error = refused(yard / "source", path)

    assert (error["code"], error["path"]) == ("invalid_request", path)


@pytest.mark.parametrize("path", ["relative", "", "{yard}/../{name}/source", "{yard}/" + "n" * 256])
def test_an_invalid_source_path(yard: Path, path: str) -> None:
    path = path.format(yard=yard, name=yard.name)

    error = refused(path, yard / "fork")

    assert (error["code"], error["path"]) == ("invalid_request", path)


def test_a_path_longer_than_the_kernel_accepts(yard: Path) -> None:
    path = f"{yard}/" + "d/" * 2100

    assert refused(path, yard / "fork")["code"] == "invalid_request"
    assert refused(yard / "source", path)["code"] == "invalid_request"


def test_the_longest_path_that_the_kernel_accepts_is_valid(yard: Path) -> None:
    parent = str(yard)
    while len(parent) < 4095 - 256:
        parent += "/" + "d" * min(255, 4095 - 202 - len(parent))
    os.makedirs(parent)
    destination = Path(parent, "n" * (4095 - 1 - len(parent)))
    assert len(os.fsencode(destination)) == 4095

    forked(yard / "source", destination)

    assert (destination / "state").name == "state"
    fd = os.open(destination, os.O_RDONLY)
    assert len(os.listdir(fd)) == 6
    os.close(fd)


def test_a_name_of_255_bytes_is_valid(yard: Path) -> None:
    destination = yard / os.fsdecode(b"\xff" * 255)

    forked(yard / "source", destination)

    assert_alike(yard / "source", destination, SKIPPED_BY_DEFAULT)


def make_directory(path: Path) -> None:
    path.mkdir()
    (path / "theirs").touch()


TAKEN: dict[str, Callable[[Path], object]] = {
    "empty directory": lambda path: path.mkdir(),
    "full directory": make_directory,
    "file": lambda path: path.write_bytes(b"theirs"),
    "dangling symlink": lambda path: path.symlink_to("nowhere"),
    "symlink to a directory": lambda path: path.symlink_to("source"),
    "fifo": lambda path: os.mkfifo(path),
}


@pytest.mark.parametrize("what", TAKEN)
def test_an_existing_destination_is_not_changed(yard: Path, what: str, limits: Limits) -> None:
    TAKEN[what](yard / "fork")
    before = os.lstat(yard / "fork")

    error = refused(yard / "source", yard / "fork", limits=limits)

    assert (error["code"], error["path"]) == ("destination_exists", str(yard / "fork"))
    assert os.lstat(yard / "fork") == before


def test_a_source_as_its_own_destination_and_below_its_destination(yard: Path) -> None:
    nested = make_guest(yard / "nested" / "guest")

    assert refused(yard / "source", yard / "source")["code"] == "destination_exists"
    assert refused(nested, yard / "nested")["code"] == "destination_exists"
    assert refused(nested, Path("/"))["code"] == "destination_exists"


@pytest.mark.parametrize("way", ["fork", "snapshots/fork", "logs/fork"])
def test_a_destination_inside_the_source(yard: Path, way: str) -> None:
    error = refused(yard / "source", yard / "source" / way)

    assert (error["code"], error["path"]) == ("destination_inside_source", str(yard / "source" / way))
    assert leftovers(yard / "source") == []


def test_a_destination_inside_the_source_through_a_symlink_or_a_mount(yard: Path, mounts: Path) -> None:
    (yard / "alias").symlink_to("source/snapshots")
    assert refused(yard / "source", yard / "alias" / "fork")["code"] == "destination_inside_source"

    (yard / "mounted").mkdir()
    subprocess.run(["mount", "--bind", yard / "source", yard / "mounted"], check=True)
    try:
        assert refused(yard / "source", yard / "mounted" / "fork")["code"] == "destination_inside_source"
        assert refused(yard / "mounted", yard / "source" / "fork")["code"] == "destination_inside_source"
    finally:
        subprocess.run(["umount", yard / "mounted"], check=True)


def test_paths_outside_the_roots(yard: Path) -> None:
    roots = [yard / "root"]
    make_guest(yard / "root" / "guest")
    (yard / "root" / "out").symlink_to(yard)

    for source, destination, named in (
        (yard / "source", yard / "root" / "fork", yard / "source"),
        (yard / "root" / "guest", yard / "fork", yard / "fork"),
        (yard / "root" / "out" / "source", yard / "root" / "fork", yard / "root" / "out" / "source"),
        (yard / "root" / "guest", yard / "root" / "out" / "fork", yard / "root" / "out" / "fork"),
        (yard / "root" / "guest", yard / "rootless" / "fork", yard / "rootless" / "fork"),
    ):
        error = refused(source, destination, roots=roots)
        assert (error["code"], error["path"]) == ("outside_roots", str(named))

    forked(yard / "root" / "guest", yard / "root" / "fork", roots=roots)


def test_a_symlink_in_the_source_is_cloned_and_never_followed(yard: Path) -> None:
    guest = make_guest(yard / "root" / "guest")
    (guest / "secrets").symlink_to(yard / "source")

    forked(guest, yard / "root" / "fork", roots=[yard / "root"])

    assert (yard / "root" / "fork" / "secrets").is_symlink()
    assert_alike(guest, yard / "root" / "fork", SKIPPED_BY_DEFAULT)


DEVICES: dict[str, Callable[[Path], object]] = {
    "fifo": lambda path: os.mkfifo(path),
    "character device": lambda path: os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3)),
    "block device": lambda path: os.mknod(path, stat.S_IFBLK | 0o600, os.makedev(7, 99)),
}


@pytest.mark.parametrize("what", DEVICES)
def test_a_fifo_or_device_in_the_source_before_anything_is_copied(
    yard: Path, what: str, limits: Limits, every_beat: None
) -> None:
    special = yard / "source" / "snapshots" / "special"
    DEVICES[what](special)
    phases: list[str] = []

    error = refused(
        yard / "source", yard / "fork", limits=limits, beat=lambda progress: phases.append(progress["phase"])
    )

    assert (error["code"], error["path"]) == ("unsupported_file_type", str(special))
    assert what in error["message"]
    assert set(phases) <= {"plan"}
    forked(yard / "source", yard / "fork", skip=("snapshots/special",), fork_id="fork-2", limits=limits)
    special.unlink()


def test_reflink_always_across_filesystems(yard: Path, fresh: Fresh, limits: Limits) -> None:
    error = refused(yard / "source", fresh("btrfs") / "fork", limits=limits, reflink="always")

    assert (error["code"], error["path"]) == ("reflink_unsupported", str(yard / "source" / "overlay.raw"))


def test_a_destination_that_is_full(yard: Path, small_tmpfs: SmallTmpfs, limits: Limits) -> None:
    full = small_tmpfs(6 * MIB)  # the overlay fits, the other files do not

    error = refused(yard / "source", full / "fork", limits=limits)

    assert error["code"] == "no_space"
    assert error["path"].startswith(str(full / "fork"))
    assert os.statvfs(full).f_bfree == os.statvfs(full).f_blocks
    (full / "small").mkdir()
    forked(full / "small", full / "fork")


@pytest.mark.parametrize("reflink", ["auto", "never"])
def test_a_destination_that_is_full_for_one_range_of_many(
    yard: Path, small_tmpfs: SmallTmpfs, reflink: str, fresh: Fresh
) -> None:
    source = fresh("ext4") / "source"
    source.mkdir()
    make_sparse_file(source / "disk.raw", 64 * MIB, 32 * MIB)

    full = small_tmpfs(24 * MIB)
    error = refused(source, full / "fork", limits=CHUNKED, reflink=reflink)

    assert error["code"] == "no_space"
    assert error["path"].startswith(f"{full}/fork")


def test_a_destination_that_runs_out_of_inodes_at_any_step(yard: Path, small_tmpfs: SmallTmpfs) -> None:
    """Each step of a fork in turn is the first one that finds the filesystem full."""
    full = small_tmpfs(MIB)
    source = yard / "tiny"
    (source / "below").mkdir(parents=True)
    (source / "below" / "file").touch()
    (source / "link").symlink_to("below")
    outcomes = []

    for inodes in range(1, 400):
        subprocess.run(["mount", "-o", f"remount,nr_inodes={inodes}", full], check=True)
        result = fork(source, full / "fork", limits=CHUNKED)
        assert leftovers(full) == [], f"with room for {inodes} inodes"
        outcomes.append(result["status"] if result["error"] is None else result["error"]["code"])
        if result["status"] == "succeeded":
            break
        assert not (full / "fork").exists()

    assert outcomes[-1] == "succeeded", result["error"]
    assert set(outcomes[:-1]) == {"no_space"}
    assert_alike(source, full / "fork")


def test_a_destination_on_a_read_only_filesystem(yard: Path, small_tmpfs: SmallTmpfs) -> None:
    sealed = small_tmpfs(MIB)
    subprocess.run(["mount", "-o", "remount,ro", sealed], check=True)

    error = refused(yard / "source", sealed / "fork")

    assert (error["code"], error["path"]) == ("io_error", str(sealed / "fork"))
    assert "Read-only" in error["message"]
