"""Snapshots by ordinary users, and access to a snapshot before it is published."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from tasks.copier.errors import Code, ForkError
from tasks.copier.progress import Progress
from tasks.copier.staging.control_directory import control_name
from tests.fixtures.filesystems import Fresh, idmapped_mounted, make_subvolume
from tests.support.engine.child_processes import NOBODY, in_child
from tests.support.engine.forks import (
    assert_alike,
    fork,
    leftovers,
    statuses,
)
from tests.support.engine.snapshots import SIZES, by_snapshot, file_by_file, make_subvolume_guest
from tests.support.guests import SKIPPED_BY_DEFAULT, make_guest
from tests.support.tree import snapshot


@pytest.fixture
def directory(fresh: Fresh) -> Path:
    return fresh("btrfs")


@pytest.fixture
def source(directory: Path) -> Path:
    return make_subvolume_guest(directory)


@pytest.fixture
def home(directory: Path) -> Path:
    """A directory of an ordinary user."""
    home = directory / "home"
    home.mkdir()
    os.chown(home, NOBODY, NOBODY)
    return home


def test_an_ordinary_user_forks_an_own_subvolume_by_snapshot(home: Path) -> None:
    source = make_subvolume(home / "source")
    os.chown(source, NOBODY, NOBODY)

    def make_and_fork() -> None:
        make_guest(source, SIZES)
        (source / "read-only").mkdir()
        (source / "read-only" / "file").write_bytes(b"x")
        (source / "read-only").chmod(0o555)
        (source / "overlay.raw").chmod(0o4444)
        source.chmod(0o555)
        by_snapshot(source, home / "fork", verify="content")

    in_child(make_and_fork, user=NOBODY)

    assert_alike(source, home / "fork", SKIPPED_BY_DEFAULT)


def test_an_ordinary_users_snapshot_that_is_given_up_is_removed(home: Path, source: Path, every_poll: None) -> None:
    _chown_all(source, NOBODY)

    def cancel(progress: Progress) -> None:
        if progress["phase"] == "copy" and progress["files_done"] > 3:
            assert os.path.isdir(home / control_name("fork-1") / "snapshot")
            raise ForkError(Code.CANCELLED, "cancelled on request")

    result = in_child(lambda: fork(source, home / "fork", poll=cancel), user=NOBODY)

    assert (result["status"], leftovers(home)) == ("cancelled", [])


@pytest.mark.parametrize("foreign", ["overlay.raw", "logs", ".", "vsock.sock"])
def test_a_subvolume_that_an_ordinary_user_could_not_own_or_remove_is_cloned_file_by_file(
    home: Path, source: Path, foreign: str
) -> None:
    _chown_all(source, NOBODY)
    os.chown(source / foreign, 0, 0)

    in_child(lambda: file_by_file(source, home / "fork"), user=NOBODY)

    assert {entry.uid for entry in snapshot(home / "fork").values()} == {NOBODY}


def _chown_all(root: Path, user: int) -> None:
    for path, _ in statuses(root):
        os.chown(os.path.join(os.fsencode(root), path), user, user, follow_symlinks=False)


def test_no_other_user_can_enter_a_snapshot_before_it_is_published(
    directory: Path, source: Path, every_poll: None
) -> None:
    """Its top has mode 0777 from the start, like the source."""
    seen = []

    def poll(progress: Progress) -> None:
        if progress["phase"] == "copy":
            names = leftovers(directory)
            seen.append((len(names), {stat.S_IMODE((directory / name).stat().st_mode) for name in names}))

    by_snapshot(source, directory / "fork", poll=poll)

    assert set(map(str, seen)) == {str((2, {0o700}))}
    assert (directory / "fork").stat().st_mode & 0o7777 == 0o777


@pytest.mark.parametrize("side", ["source", "home"])
def test_owners_on_an_idmapped_mount_are_those_that_the_worker_sees(directory: Path, source: Path, side: str) -> None:
    _chown_all(source, 2000)
    places = {"source": source, "home": directory / "home"}
    places["home"].mkdir()
    with idmapped_mounted(places[side], directory / "mapped", 1000) as mapped:
        places[side] = mapped

        file_by_file(places["source"], places["home"] / "fork")

        assert (places["home"] / "fork/state").stat().st_uid == (3000 if side == "source" else 2000)
        assert_alike(places["source"], places["home"] / "fork", SKIPPED_BY_DEFAULT)
