"""A source that changes while it is cloned fails the fork; a torn copy is never published."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tasks.copier.options import Limits
from tasks.copier.progress import Progress
from tests.fixtures.filesystems import Fresh
from tests.support.engine.forks import CHUNKED, MIB, assert_alike, fork, forked, refused
from tests.support.engine.source_writers import ChangeOnce, closing, copying, in_a_file, planning, wait_for_clock_tick
from tests.support.guests import SKIPPED_BY_DEFAULT, make_guest, make_sparse_file
from tests.support.tree import snapshot

pytestmark = pytest.mark.usefixtures("every_poll")


@pytest.fixture
def directory(fresh: Fresh) -> Path:
    return fresh("xfs")


@pytest.fixture
def source(directory: Path) -> Path:
    source = make_guest(directory / "source")
    wait_for_clock_tick()
    return source


def write(path: Path) -> None:
    with path.open("r+b") as file:
        os.pwrite(file.fileno(), b"the machine goes on", 12_288)


def replace(path: Path) -> None:
    make_sparse_file(path.with_name("new"), path.stat().st_size, MIB)
    path.with_name("new").rename(path)


def swap_for_symlink(path: Path) -> None:
    path.rename(path.with_name("aside"))
    path.symlink_to("/etc/passwd")


def swap_for_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def swap_for_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


FILE_CHANGES: dict[str, Callable[[Path], object]] = {
    "written": write,
    "truncated": lambda path: os.truncate(path, 4096),
    "emptied": lambda path: os.truncate(path, 0),
    "grown": lambda path: os.truncate(path, path.stat().st_size + 1),
    "removed": lambda path: path.unlink(),
    "renamed": lambda path: path.rename(path.with_name("moved")),
    "replaced": replace,
    "a symlink": swap_for_symlink,
    "a fifo": swap_for_fifo,
    "a directory": swap_for_directory,
    "written, its mtime set back": lambda path: _write_quietly(path),
}


def _write_quietly(path: Path) -> None:
    before = path.stat()
    write(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("change", FILE_CHANGES)
@pytest.mark.parametrize("reflink", ["auto", "never"])
def test_a_file_that_changes_before_its_clone(directory: Path, source: Path, change: str, reflink: str) -> None:
    path = source / "snapshots" / "snapshot-latest" / "memory"
    writer = ChangeOnce(lambda: FILE_CHANGES[change](path), copying)

    error = refused(source, directory / "fork", poll=writer, reflink=reflink)

    assert writer.done
    assert error["code"] == "source_changed"
    assert error["path"].startswith(str(source))


@pytest.mark.parametrize("change", FILE_CHANGES)
def test_a_file_that_changes_while_its_bytes_are_copied(directory: Path, source: Path, change: str) -> None:
    path = source / "overlay.raw"
    writer = ChangeOnce(lambda: FILE_CHANGES[change](path), in_a_file)

    error = refused(source, directory / "fork", poll=writer, reflink="never")

    assert writer.done
    assert error["code"] == "source_changed"
    assert error["path"].startswith(str(source))


@pytest.mark.parametrize("change", ["written", "truncated", "removed", "replaced", "grown"])
def test_a_file_that_changes_while_its_ranges_are_copied(directory: Path, change: str) -> None:
    """Two children copy it, and the test acts when the parent polls first: between two ranges, or in one."""
    source = directory / "source"
    source.mkdir()
    make_sparse_file(source / "disk.raw", 256 * MIB, 192 * MIB)
    wait_for_clock_tick()
    writer = ChangeOnce(lambda: FILE_CHANGES[change](source / "disk.raw"), lambda progress: progress["phase"] == "copy")

    error = refused(source, directory / "fork", poll=writer, reflink="never", limits=CHUNKED)

    assert writer.done
    assert error["code"] == "source_changed"
    assert error["path"].startswith(str(source))


@pytest.mark.parametrize("change", FILE_CHANGES)
def test_a_file_that_changes_after_its_clone_and_before_the_publish(
    directory: Path, source: Path, change: str, limits: Limits
) -> None:
    """Otherwise the files of the fork would be from two moments: a disk that does not match the memory."""
    path = source / "snapshots" / "snapshot-latest" / "memory"
    writer = ChangeOnce(lambda: FILE_CHANGES[change](path), closing)

    error = refused(source, directory / "fork", poll=writer, limits=limits)

    assert writer.done
    assert error["code"] == "source_changed"
    assert error["path"].startswith(str(source))


TREE_CHANGES: dict[str, Callable[[Path], object]] = {
    "a new file": lambda source: (source / "snapshots" / "new").touch(),
    "a new directory": lambda source: (source / "new").mkdir(),
    "a removed directory": lambda source: (source / "void").rmdir(),
    "a moved directory": lambda source: (source / "snapshots").rename(source / "moved"),
    "a directory swapped for a symlink": lambda source: _swap(source / "snapshots"),
    "another symlink target": lambda source: _retarget(source / "link"),
    "a removed hard link": lambda source: (source / "second").unlink(),
    "the source moved away": lambda source: source.rename(source.with_name("moved")),
}


def _swap(path: Path) -> None:
    path.rename(path.with_name("aside"))
    path.symlink_to("aside")


def _retarget(path: Path) -> None:
    path.unlink()
    path.symlink_to("elsewhere")


@pytest.mark.parametrize("change", [name for name in TREE_CHANGES if name != "the source moved away"])
@pytest.mark.parametrize("when", [copying, closing])
def test_entries_that_are_created_removed_or_exchanged(
    directory: Path, change: str, when: Callable[[Progress], bool], limits: Limits
) -> None:
    source = make_guest(directory / "source")
    (source / "void").mkdir()
    (source / "link").symlink_to("nowhere")
    os.link(source / "state", source / "second")
    wait_for_clock_tick()
    writer = ChangeOnce(lambda: TREE_CHANGES[change](source), when)

    error = refused(source, directory / "fork", poll=writer, limits=limits)

    assert writer.done
    assert error["code"] == "source_changed"
    assert error["path"].startswith(str(source))


def test_a_file_that_is_removed_during_the_walk(directory: Path, source: Path) -> None:
    writer = ChangeOnce(lambda: (source / "snapshots" / "snapshot-latest").rename(directory / "moved"), planning)

    result = fork(source, directory / "fork", poll=writer)

    # The walk meets either all of it or nothing; it must not find half of it.
    assert writer.done
    if result["status"] == "succeeded":
        assert_alike(source, directory / "fork", SKIPPED_BY_DEFAULT)
    else:
        assert result["error"] is not None
        assert result["error"]["code"] == "source_changed"


def test_skipped_entries_may_come_and_go(directory: Path, source: Path, limits: Limits) -> None:
    """The sockets, logs and half-written compressed files of a running guest."""

    def live() -> None:
        (source / "logs" / "console.log").write_text("more")
        (source / "logs" / "new.log").touch()
        (source / "vsock.sock").unlink()
        (source / "state.zst.tmp").touch()
        (source / "snapshots" / "snapshot-latest" / "memory.lz4.tmp").unlink()

    for number, when in enumerate((planning, copying, closing)):
        writer = ChangeOnce(live, when)
        forked(source, directory / f"fork-{number}", poll=writer, limits=limits)
        assert writer.done
        (source / "vsock.sock").touch()
        (source / "snapshots" / "snapshot-latest" / "memory.lz4.tmp").touch()
        (source / "state.zst.tmp").unlink()
        wait_for_clock_tick()


def test_a_swapped_directory_does_not_lead_out_of_the_roots(directory: Path) -> None:
    source = make_guest(directory / "root" / "source")
    (directory / "outside" / "snapshot-latest").mkdir(parents=True)
    (directory / "outside" / "snapshot-latest" / "memory").write_bytes(b"a secret")
    before = snapshot(directory / "outside")
    wait_for_clock_tick()

    def swap() -> None:
        (source / "snapshots").rename(source / "aside")
        (source / "snapshots").symlink_to("../../outside")

    writer = ChangeOnce(swap, copying)
    error = refused(source, directory / "root" / "fork", poll=writer, roots=[directory / "root"])

    assert writer.done
    assert error["code"] == "source_changed"
    assert snapshot(directory / "outside") == before


def test_a_destinations_parent_swapped_for_a_symlink_does_not_lead_out_of_the_roots(
    directory: Path, source: Path
) -> None:
    (directory / "root").mkdir()
    (directory / "outside").mkdir()
    source.rename(directory / "root" / "source")
    parent = directory / "root" / "parent"
    parent.mkdir()

    def swap() -> None:
        parent.rename(directory / "root" / "aside")
        parent.symlink_to(directory / "outside")

    writer = ChangeOnce(swap, copying)
    fork(directory / "root" / "source", parent / "fork", poll=writer, roots=[directory / "root"])

    assert writer.done
    assert list((directory / "outside").iterdir()) == []


def test_a_file_replaced_by_an_equal_one_is_a_change(directory: Path, source: Path) -> None:
    def replace_alike() -> None:
        path = source / "state"
        before = path.stat()
        path.with_name("new").write_bytes(path.read_bytes())
        os.utime(path.with_name("new"), ns=(before.st_atime_ns, before.st_mtime_ns))
        path.with_name("new").rename(path)

    assert refused(source, directory / "fork", poll=ChangeOnce(replace_alike, copying))["code"] == "source_changed"


def test_the_next_fork_of_a_source_that_no_longer_changes_succeeds(directory: Path, source: Path) -> None:
    refused(source, directory / "fork", poll=ChangeOnce(lambda: write(source / "state"), copying))

    forked(source, directory / "fork")

    assert_alike(source, directory / "fork", SKIPPED_BY_DEFAULT)
