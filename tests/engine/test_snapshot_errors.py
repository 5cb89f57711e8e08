"""A fork by snapshot when a system call is refused or fails."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.fixtures.filesystems import Fresh, make_subvolume
from tests.support.engine.forks import (
    MIB,
    assert_alike,
    leftovers,
)
from tests.support.engine.snapshots import by_snapshot, make_subvolume_guest
from tests.support.engine.traced_forks import control, in_tree, trace_fork
from tests.support.guests import SKIPPED_BY_DEFAULT, make_sparse_file
from tests.support.requirements import require_command


@pytest.fixture
def directory(fresh: Fresh) -> Path:
    return fresh("btrfs")


@pytest.fixture
def source(directory: Path) -> Path:
    return make_subvolume_guest(directory)


@pytest.fixture(scope="session")
def strace() -> str:
    return require_command("strace", "the injection of errors")


#: The ioctls in the control directory, in order: a test whether a subvolume may be removed, then the snapshot.
_REMOVAL_TEST, _SNAPSHOT = 1, 2


@pytest.mark.parametrize("name", ["EPERM", "EXDEV", "EINVAL", "ETXTBSY", "EOPNOTSUPP", "EAGAIN"])
def test_a_refused_snapshot_falls_back_to_file_by_file(strace: str, directory: Path, source: Path, name: str) -> None:
    fork = directory / "fork"
    traced = trace_fork(
        strace, source, fork, calls="ioctl", inject=[f"ioctl:error={name}:when={_SNAPSHOT}"], paths=[control(fork)]
    )

    assert traced.calls("SNAP_CREATE") == traced.calls("(INJECTED)") == 1
    assert {one["method"] for one in traced.files.values()} == {"reflink", "hardlink", "mkdir", "skip"}
    assert_alike(source, fork, SKIPPED_BY_DEFAULT)
    assert leftovers(directory) == []


def test_a_snapshot_is_not_written_to_unnecessarily(strace: str, directory: Path) -> None:
    source, fork = make_subvolume(directory / "source"), directory / "fork"
    (source / "below").mkdir()
    make_sparse_file(source / "below" / "disk.raw", 8 * MIB, MIB)
    os.utime(source / "below", (86_400, 86_400))

    traced = trace_fork(
        strace,
        source,
        fork,
        calls="getdents64,fchmod,fchmodat,utimensat,fsetxattr,fchown",
        paths=[control(fork, "snapshot"), control(fork, "snapshot") / "below", in_tree(fork)],
    )

    assert traced.result is not None
    assert traced.result["subvolume"]
    assert traced.calls("getdents64")  # the empty tree, which the snapshot replaces, and the snapshot are listed
    assert [line for line in traced.trace if "getdents64" not in line and "exited" not in line] == []
    assert_alike(source, fork)


@pytest.mark.parametrize(
    ("call", "when", "name", "code"),
    [
        ("ioctl", _SNAPSHOT, "EIO", "io_error"),
        ("ioctl", _SNAPSHOT, "ENOSPC", "no_space"),
        ("ioctl", _SNAPSHOT, "EDQUOT", "no_space"),
        ("mkdirat", 1, "ENOSPC", "no_space"),
        ("fchmod", 1, "EIO", "io_error"),
        ("statx", 4, "EIO", "io_error"),
        ("getdents64", 1, "EIO", "io_error"),
        ("unlinkat", 2, "EIO", "io_error"),
        ("renameat2", 1, "EIO", "io_error"),
        ("renameat2", 1, "ENOENT", "io_error"),
    ],
)
def test_an_error_during_the_fork_fails_it_and_leaves_nothing(
    strace: str, directory: Path, source: Path, call: str, when: int, name: str, code: str
) -> None:
    fork = directory / "fork"
    control_directory = control(fork)
    if call == "fchmod":
        source.chmod(0o577)  # otherwise it is not called
    traced = trace_fork(
        strace,
        source,
        fork,
        calls=call,
        inject=[f"{call}:error={name}:when={when}"],
        paths=[control_directory, control_directory / "snapshot", control_directory / "snapshot" / "snapshots"],
    )

    assert traced.calls("(INJECTED)") == 1
    assert traced.result is not None
    assert traced.result["error"] is not None
    assert traced.result["error"]["code"] == code
    assert sorted(path.name for path in directory.iterdir()) == ["source"]
    by_snapshot(source, fork)


def test_a_subvolume_that_may_not_be_destroyed_is_emptied_and_removed(
    strace: str, directory: Path, source: Path
) -> None:
    fork = directory / "fork"
    traced = trace_fork(
        strace, source, fork, calls="ioctl", inject=[f"ioctl:error=EPERM:when={_REMOVAL_TEST}"], paths=[control(fork)]
    )

    assert traced.result is not None
    assert traced.result["subvolume"]
    assert_alike(source, fork, SKIPPED_BY_DEFAULT)
