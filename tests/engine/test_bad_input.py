"""Bad input fails with its own code and the path. Nothing is left behind, and the next fork succeeds."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tasks.copier.options import Limits
from tests.fixtures.filesystems import Fresh, SmallTmpfs, bind_mounted, make_subvolume
from tests.support.engine.forks import CHUNKED, MIB, assert_alike, fork, forked, leftovers, refused
from tests.support.engine.local_campaigns import campaign
from tests.support.guests import SKIPPED_BY_DEFAULT, make_guest, make_sparse_file
from tests.support.tree import Entry, snapshot


@pytest.fixture
def workdir(fresh: Fresh) -> Iterator[Path]:
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


def test_a_source_that_is_missing(workdir: Path) -> None:
    error = refused(workdir / "none", workdir / "fork")

    assert (error["code"], error["path"]) == ("source_not_found", str(workdir / "none"))


@pytest.mark.parametrize("path", ["file", "file/below", "dangling"])
def test_a_source_that_is_no_directory(workdir: Path, path: str) -> None:
    (workdir / "file").touch()
    (workdir / "dangling").symlink_to("none")

    error = refused(workdir / path, workdir / "fork")

    code = "source_not_found" if path == "dangling" else "source_not_directory"
    assert (error["code"], error["path"]) == (code, str(workdir / path))


@pytest.mark.parametrize(
    "path",
    [
        "relative",
        "",
        "{workdir}/../{name}/fork",
        "{workdir}/none/fork",
        "{workdir}/source/state/fork",
        "{workdir}/" + "n" * 256,
    ],
)
def test_an_invalid_destination_path(workdir: Path, path: str) -> None:
    path = path.format(workdir=workdir, name=workdir.name)

    error = refused(workdir / "source", path)

    assert (error["code"], error["path"]) == ("invalid_request", path)


@pytest.mark.parametrize("path", ["relative", "", "{workdir}/../{name}/source", "{workdir}/" + "n" * 256])
def test_an_invalid_source_path(workdir: Path, path: str) -> None:
    path = path.format(workdir=workdir, name=workdir.name)

    error = refused(path, workdir / "fork")

    assert (error["code"], error["path"]) == ("invalid_request", path)


def test_a_path_longer_than_the_kernel_accepts(workdir: Path) -> None:
    path = f"{workdir}/" + "d/" * 2100

    assert refused(path, workdir / "fork")["code"] == "invalid_request"
    assert refused(workdir / "source", path)["code"] == "invalid_request"


def test_the_longest_path_that_the_kernel_accepts_is_valid(workdir: Path) -> None:
    parent = str(workdir)
    while len(parent) < 4095 - 256:
        parent += "/" + "d" * min(255, 4095 - 202 - len(parent))
    os.makedirs(parent)
    destination = Path(parent, "n" * (4095 - 1 - len(parent)))
    assert len(os.fsencode(destination)) == 4095

    forked(workdir / "source", destination)

    assert (destination / "state").name == "state"
    fd = os.open(destination, os.O_RDONLY)
    assert len(os.listdir(fd)) == 6
    os.close(fd)


def test_a_name_of_255_bytes_is_valid(workdir: Path) -> None:
    destination = workdir / os.fsdecode(b"\xff" * 255)

    forked(workdir / "source", destination)

    assert_alike(workdir / "source", destination, SKIPPED_BY_DEFAULT)


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
def test_an_existing_destination_is_not_changed(workdir: Path, what: str, limits: Limits) -> None:
    TAKEN[what](workdir / "fork")
    before = os.lstat(workdir / "fork")

    error = refused(workdir / "source", workdir / "fork", limits=limits)

    assert (error["code"], error["path"]) == ("destination_exists", str(workdir / "fork"))
    assert os.lstat(workdir / "fork") == before


def test_a_source_as_its_own_destination_and_below_its_destination(workdir: Path) -> None:
    nested = make_guest(workdir / "nested" / "guest")

    assert refused(workdir / "source", workdir / "source")["code"] == "destination_exists"
    assert refused(nested, workdir / "nested")["code"] == "destination_exists"
    assert refused(nested, Path("/"))["code"] == "destination_exists"


@pytest.mark.parametrize("way", ["fork", "snapshots/fork", "logs/fork"])
def test_a_destination_inside_the_source(workdir: Path, way: str) -> None:
    error = refused(workdir / "source", workdir / "source" / way)

    assert (error["code"], error["path"]) == ("destination_inside_source", str(workdir / "source" / way))
    assert leftovers(workdir / "source") == []


def test_a_destination_inside_the_source_through_a_symlink_or_a_mount(workdir: Path, mounts: Path) -> None:
    (workdir / "alias").symlink_to("source/snapshots")
    assert refused(workdir / "source", workdir / "alias" / "fork")["code"] == "destination_inside_source"

    (workdir / "mounted").mkdir()
    subprocess.run(["mount", "--bind", workdir / "source", workdir / "mounted"], check=True)
    try:
        assert refused(workdir / "source", workdir / "mounted" / "fork")["code"] == "destination_inside_source"
        assert refused(workdir / "mounted", workdir / "source" / "fork")["code"] == "destination_inside_source"
    finally:
        subprocess.run(["umount", workdir / "mounted"], check=True)


@pytest.mark.parametrize("name", ["snapshots", "logs"])
def test_a_destination_in_a_directory_of_the_source_that_is_mounted_elsewhere(
    workdir: Path, limits: Limits, name: str
) -> None:
    source = workdir / "source"
    before = files_of(source)

    with bind_mounted(source / name, workdir / "mounted") as mounted:
        error = refused(source, mounted / "fork", limits=limits)
        result = campaign(source, [mounted / "fork"])

    assert (error["code"], error["path"]) == ("destination_inside_source", str(workdir / "mounted/fork"))
    assert [failure["error"]["code"] for failure in result["failures"]] == ["destination_inside_source"]
    assert files_of(source) == before


def test_a_destination_in_a_directory_that_is_mounted_in_the_source(workdir: Path) -> None:
    (workdir / "parent/below").mkdir(parents=True)

    with bind_mounted(workdir / "parent", workdir / "source/mounted"):
        assert refused(workdir / "source", workdir / "parent/fork")["code"] == "destination_inside_source"
        assert refused(workdir / "source", workdir / "parent/below/fork")["code"] == "destination_inside_source"


def test_a_destination_in_a_directory_of_a_subvolume_that_is_mounted_elsewhere(fresh: Fresh) -> None:
    directory = fresh("btrfs")
    source = make_guest(make_subvolume(directory / "source"))

    with bind_mounted(source / "snapshots", directory / "mounted") as mounted:
        assert refused(source, mounted / "fork")["code"] == "destination_inside_source"


def test_a_destination_in_an_append_only_directory(workdir: Path) -> None:
    """Nothing in it can be renamed or removed, so nothing may be made in it."""
    parent = workdir / "append-only"
    parent.mkdir()
    subprocess.run(["chattr", "+a", parent], check=True)
    try:
        error = refused(workdir / "source", parent / "fork")
        result = campaign(workdir / "source", [workdir / "vm-1", parent / "vm-2"])

        assert (error["code"], error["path"]) == ("permission_denied", str(parent))
        assert [failure["error"]["path"] for failure in result["failures"]] == [str(parent)]
        assert list(parent.iterdir()) == []
    finally:
        subprocess.run(["chattr", "-a", parent], check=True)


def test_paths_outside_the_roots(workdir: Path) -> None:
    roots = [workdir / "root"]
    make_guest(workdir / "root" / "guest")
    (workdir / "root" / "out").symlink_to(workdir)

    for source, destination, named in (
        (workdir / "source", workdir / "root" / "fork", workdir / "source"),
        (workdir / "root" / "guest", workdir / "fork", workdir / "fork"),
        (workdir / "root" / "out" / "source", workdir / "root" / "fork", workdir / "root" / "out" / "source"),
        (workdir / "root" / "guest", workdir / "root" / "out" / "fork", workdir / "root" / "out" / "fork"),
        (workdir / "root" / "guest", workdir / "rootless" / "fork", workdir / "rootless" / "fork"),
    ):
        error = refused(source, destination, roots=roots)
        assert (error["code"], error["path"]) == ("outside_roots", str(named))

    forked(workdir / "root" / "guest", workdir / "root" / "fork", roots=roots)


def test_a_symlink_in_the_source_is_cloned_and_never_followed(workdir: Path) -> None:
    guest = make_guest(workdir / "root" / "guest")
    (guest / "secrets").symlink_to(workdir / "source")

    forked(guest, workdir / "root" / "fork", roots=[workdir / "root"])

    assert (workdir / "root" / "fork" / "secrets").is_symlink()
    assert_alike(guest, workdir / "root" / "fork", SKIPPED_BY_DEFAULT)


DEVICES: dict[str, Callable[[Path], object]] = {
    "fifo": lambda path: os.mkfifo(path),
    "character device": lambda path: os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3)),
    "block device": lambda path: os.mknod(path, stat.S_IFBLK | 0o600, os.makedev(7, 99)),
}


@pytest.mark.parametrize("what", DEVICES)
def test_a_fifo_or_device_in_the_source_before_anything_is_copied(
    workdir: Path, what: str, limits: Limits, every_poll: None
) -> None:
    special = workdir / "source" / "snapshots" / "special"
    DEVICES[what](special)
    phases: list[str] = []

    error = refused(
        workdir / "source", workdir / "fork", limits=limits, poll=lambda progress: phases.append(progress["phase"])
    )

    assert (error["code"], error["path"]) == ("unsupported_file_type", str(special))
    assert what in error["message"]
    assert set(phases) <= {"plan"}
    forked(workdir / "source", workdir / "fork", skip=("snapshots/special",), fork_id="fork-2", limits=limits)
    special.unlink()


def test_reflink_always_across_filesystems(workdir: Path, fresh: Fresh, limits: Limits) -> None:
    error = refused(workdir / "source", fresh("btrfs") / "fork", limits=limits, reflink="always")

    assert (error["code"], error["path"]) == ("reflink_unsupported", str(workdir / "source" / "overlay.raw"))


def test_a_destination_that_is_full(workdir: Path, small_tmpfs: SmallTmpfs, limits: Limits) -> None:
    full = small_tmpfs(6 * MIB)  # the overlay fits, the other files do not

    error = refused(workdir / "source", full / "fork", limits=limits)

    assert error["code"] == "no_space"
    assert error["path"].startswith(str(full / "fork"))
    assert os.statvfs(full).f_bfree == os.statvfs(full).f_blocks
    (full / "small").mkdir()
    forked(full / "small", full / "fork")


@pytest.mark.parametrize("reflink", ["auto", "never"])
def test_a_destination_that_is_full_for_one_range_of_many(
    workdir: Path, small_tmpfs: SmallTmpfs, reflink: str, fresh: Fresh
) -> None:
    source = fresh("ext4") / "source"
    source.mkdir()
    make_sparse_file(source / "disk.raw", 64 * MIB, 32 * MIB)

    full = small_tmpfs(24 * MIB)
    error = refused(source, full / "fork", limits=CHUNKED, reflink=reflink)

    assert error["code"] == "no_space"
    assert error["path"].startswith(f"{full}/fork")


def test_a_destination_that_runs_out_of_inodes_at_any_step(workdir: Path, small_tmpfs: SmallTmpfs) -> None:
    """Each step of a fork in turn is the first one that finds the filesystem full."""
    full = small_tmpfs(MIB)
    source = workdir / "tiny"
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


def test_a_destination_on_a_read_only_filesystem(workdir: Path, small_tmpfs: SmallTmpfs) -> None:
    read_only = small_tmpfs(MIB)
    subprocess.run(["mount", "-o", "remount,ro", read_only], check=True)

    error = refused(workdir / "source", read_only / "fork")

    assert (error["code"], error["path"]) == ("io_error", str(read_only / "fork"))
    assert "Read-only" in error["message"]
