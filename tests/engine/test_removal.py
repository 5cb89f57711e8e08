"""Removing a directory: it stays inside it, removes everything it can, and ends."""

from __future__ import annotations

import errno
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tasks.copier.kernel import syscalls, trees
from tasks.copier.staging.staging import Staging
from tests.fixtures.filesystems import Fresh, bind_mounted, make_subvolume
from tests.fixtures.fuse import Bindfs, Passthrough
from tests.fixtures.processes import wait_until
from tests.support.engine.child_processes import Child
from tests.support.engine.forks import leftovers
from tests.support.requirements import require_command

#: Far longer than a removal waits for a directory to become empty, in seconds.
_LONG = 10.0


@pytest.fixture(params=["bindfs", "silly"])
def silly(request: pytest.FixtureRequest, passthrough: Passthrough, bindfs: Bindfs, fresh: Fresh) -> Path:
    """A FUSE filesystem that keeps an unlinked open file in its directory under another name."""
    backing = fresh("xfs")
    return bindfs(backing) if request.param == "bindfs" else passthrough(backing, "silly")


@pytest.fixture
def fd_of() -> Iterator[Callable[[Path], int]]:
    """Opens directories during a test."""
    opened: list[int] = []

    def open_directory(path: Path) -> int:
        opened.append(os.open(path, os.O_RDONLY | os.O_DIRECTORY))
        return opened[-1]

    yield open_directory
    for fd in opened:
        os.close(fd)


def make_tree(top: Path) -> Path:
    """Some directories, files and links; one link leads out."""
    (top / "a/b/c").mkdir(parents=True)
    for path in (top / "state", top / "a/disk", top / "a/b/c/deep"):
        path.write_text("x")
    (top / "a/out").symlink_to("../..")
    (top / "a/dangling").symlink_to("nowhere")
    os.mkfifo(top / "a/fifo")
    return top


def test_a_tree_is_removed_and_nothing_outside_it(fs: Path, fd_of: Callable[[Path], int]) -> None:
    (fs / "beside").write_text("stays")
    make_tree(fs / "tree")

    trees.remove(fd_of(fs), "tree")
    trees.remove(fd_of(fs), "tree")  # already removed

    assert [path.name for path in fs.iterdir()] == ["beside"]


def test_a_symlink_is_not_followed(fresh: Fresh, fd_of: Callable[[Path], int]) -> None:
    workdir = fresh("tmpfs")
    make_tree(workdir / "theirs")
    (workdir / "link").symlink_to("theirs")

    with pytest.raises(OSError, match="link"):
        trees.remove(fd_of(workdir), "link")

    assert (workdir / "theirs/a/b/c/deep").exists()
    assert (workdir / "link").is_symlink()


@pytest.mark.parametrize("kind", ["xfs", "btrfs", "tmpfs"])
@pytest.mark.parametrize("where", ["", "a", "a/b/c"])
def test_a_mount_is_not_entered_and_the_rest_is_removed(
    kind: str, where: str, fresh: Fresh, fd_of: Callable[[Path], int]
) -> None:
    workdir, mounted = fresh("xfs"), make_tree(fresh(kind) / "precious")  # type: ignore[arg-type]
    tree = make_tree(workdir / "tree")
    point = tree / where / "mounted"

    with bind_mounted(mounted, point):
        with pytest.raises(OSError, match="mounted") as refusal:
            trees.remove(fd_of(workdir), "tree")
        assert (refusal.value.errno, refusal.value.filename) == (errno.EXDEV, str(point.relative_to(workdir)))
        assert sorted(path for path in tree.rglob("*") if mounted.name not in path.parts and path.is_file()) == sorted(
            path for path in point.rglob("*") if path.is_file()
        )
        assert (point / "a/b/c/deep").exists()
    assert (mounted / "a/b/c/deep").exists()
    trees.remove(fd_of(workdir), "tree")
    assert list(workdir.iterdir()) == []


def test_a_mount_point_is_not_removed(fresh: Fresh, fd_of: Callable[[Path], int]) -> None:
    workdir, mounted = fresh("xfs"), make_tree(fresh("xfs") / "precious")

    with bind_mounted(mounted, workdir / "tree"), pytest.raises(OSError, match="mounted"):
        trees.remove(fd_of(workdir), "tree")

    assert (mounted / "a/b/c/deep").exists()


def test_nested_subvolumes_are_removed(fresh: Fresh, fd_of: Callable[[Path], int]) -> None:
    workdir = fresh("btrfs")
    (workdir / "tree").mkdir()
    make_tree(make_subvolume(workdir / "tree/subvolume"))
    make_tree(make_subvolume(workdir / "tree/subvolume/a/nested"))
    make_tree(make_subvolume(workdir / "other"))
    make_tree(make_subvolume(workdir / "other/a/nested"))

    trees.remove(fd_of(workdir), "tree")
    trees.remove(fd_of(workdir), "other")

    assert list(workdir.iterdir()) == []


def test_subvolume_is_removed_in_one_step_and_an_entry_that_took_its_name_is_kept(
    fresh: Fresh, fd_of: Callable[[Path], int]
) -> None:
    workdir = fresh("btrfs")
    make_tree(make_subvolume(workdir / "tree"))
    opened = fd_of(workdir / "tree")
    (workdir / "tree").rename(workdir / "moved")
    make_tree(make_subvolume(workdir / "tree"))

    syscalls.destroy_opened_subvolume(fd_of(workdir), opened)

    assert [path.name for path in workdir.iterdir()] == ["tree"]
    assert (workdir / "tree/a/b/c/deep").exists()


def test_an_entry_that_cannot_be_removed_is_named_and_the_rest_is_removed(
    fresh: Fresh, fd_of: Callable[[Path], int]
) -> None:
    workdir = fresh("xfs")
    tree = make_tree(workdir / "tree")
    chattr = require_command("chattr", "immutable files")
    subprocess.run([chattr, "+i", tree / "a/disk"], check=True)
    try:
        with pytest.raises(PermissionError) as refusal:
            trees.remove(fd_of(workdir), "tree")

        assert refusal.value.filename == "tree/a/disk"
        assert sorted(path.name for path in tree.rglob("*")) == ["a", "disk"]
    finally:
        subprocess.run([chattr, "-i", tree / "a/disk"], check=True)


@pytest.mark.parametrize("mode", [0o000, 0o111, 0o222, 0o444, 0o500])
def test_an_ordinary_user_removes_own_directories_whatever_their_mode(mode: int, fresh: Fresh) -> None:
    workdir = fresh("xfs")
    workdir.chmod(0o777)

    def remove() -> list[str]:
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
        tree = make_tree(workdir / "tree")
        for directory in ("a/b/c", "a/b", "a"):
            (tree / directory).chmod(mode)
        fd = os.open(workdir, os.O_RDONLY)
        trees.remove(fd, "tree")
        return os.listdir(workdir)

    assert Child(remove).result() == []


def test_a_directory_with_an_open_file_is_given_up_in_seconds(silly: Path, fd_of: Callable[[Path], int]) -> None:
    make_tree(silly / "tree")
    parent = fd_of(silly)

    with (silly / "tree/a/disk").open():
        began = time.monotonic()
        with pytest.raises(OSError, match="keeps files in it open") as refusal:
            trees.remove(parent, "tree")
        assert time.monotonic() - began < _LONG
        assert refusal.value.errno == errno.ENOTEMPTY
        assert not (silly / "tree/state").exists()

    trees.remove(parent, "tree")
    assert list(silly.iterdir()) == []


def test_a_file_that_is_closed_meanwhile_is_waited_for(silly: Path, fd_of: Callable[[Path], int]) -> None:
    make_tree(silly / "tree")
    file = (silly / "tree/a/disk").open()
    closing = threading.Timer(0.2, file.close)
    closing.start()

    trees.remove(fd_of(silly), "tree")

    closing.join()
    assert list(silly.iterdir()) == []


def test_a_directory_that_is_filled_all_the_time_is_given_up(fresh: Fresh, fd_of: Callable[[Path], int]) -> None:
    workdir = fresh("tmpfs")
    (workdir / "tree").mkdir()
    top, ended = fd_of(workdir / "tree"), threading.Event()

    def fill() -> None:
        n = 0
        while not ended.is_set():
            n += 1
            try:
                os.close(os.open(f"file-{n}", os.O_CREAT | os.O_WRONLY, dir_fd=top))
            except FileNotFoundError:
                return  # it was removed at a moment when it was empty

    threads = [threading.Thread(target=fill) for _ in range(2)]
    for thread in threads:
        thread.start()
    began = time.monotonic()
    with suppress(OSError):
        trees.remove(fd_of(workdir), "tree")
    ended.set()
    for thread in threads:
        thread.join()
    assert time.monotonic() - began < _LONG


def test_staging_is_removed_although_its_lock_is_open(silly: Path, fd_of: Callable[[Path], int]) -> None:
    parent = fd_of(silly)

    with Staging.claim(parent, "fork-1", wait=0) as staging:
        staging.begin({"fork_id": "fork-1"}, None)
        staging.remove()

        assert leftovers(silly) == []
        staging.remove()
        with Staging.claim(parent, "fork-1", wait=0) as next_one:
            next_one.remove()

    assert list(silly.iterdir()) == []


def test_staging_that_another_process_waits_for_is_removed_with_its_name(
    silly: Path, fd_of: Callable[[Path], int]
) -> None:
    def wait_for_it() -> bool:
        wait_until((silly / "go").exists, "the start signal")
        fd = os.open(silly, os.O_RDONLY)
        with Staging.attach(fd, "fork-1", wait=_LONG) as staging:
            return staging is not None

    waiting = Child(wait_for_it)  # before the claim: a child inherits its parent's locks
    with Staging.claim(fd_of(silly), "fork-1", wait=0) as staging:
        lock = os.stat("lock", dir_fd=staging.fd)
        (silly / "go").touch()
        while not any(os.path.samestat(lock, found) for found in _open_files(waiting.pid)):
            time.sleep(0.01)
        staging.remove()

    assert waiting.result() is False
    assert [path.name for path in silly.iterdir()] == ["go"]


def _open_files(pid: int) -> list[os.stat_result]:
    found = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):  # closed in the meantime
            found.append(os.stat(f"/proc/{pid}/fd/{fd}"))
    return found


def test_staging_claimed_again_during_its_removal_is_kept(fresh: Fresh, fd_of: Callable[[Path], int]) -> None:
    workdir = fresh("xfs")
    parent = fd_of(workdir)

    with Staging.claim(parent, "fork-1", wait=0) as old:
        (workdir / old.name / "lock").unlink()  # as in `old.remove` before its last step
        with Staging.claim(parent, "fork-1", wait=0) as new:
            assert new.is_current()

            old.remove()

            assert new.is_current()
            assert (workdir / new.name / "lock").exists()
