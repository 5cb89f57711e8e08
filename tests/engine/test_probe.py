"""Two large files that are reflinked in parallel on XFS: the same result as one after the other, but sooner."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.fixtures.filesystems import Fresh
from tests.support.engine.forks import MIB, assert_alike, leftovers
from tests.support.engine.traced_forks import Traced, in_tree, trace_fork
from tests.support.requirements import require_command

FICLONE = "FICLONE"
#: Names of files, the largest first.
LARGE = ("a", "b", "c")


@pytest.fixture
def strace() -> str:
    return require_command("strace", "system calls that fail")


def make_source(directory: Path) -> Path:
    source = directory / "source"
    source.mkdir()
    for number, name in enumerate(LARGE):
        with open(source / name, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, (68 - number) * MIB)
            file.write(name.encode() * 9000)
    (source / "small").write_bytes(b"small")
    return source


def threads(traced: Traced) -> dict[str, str]:
    """The thread that reflinked each file."""
    calls = [line.split(maxsplit=1) for line in traced.trace if FICLONE in line]
    return {name: thread for thread, call in calls for name in (*LARGE, "small") if f"/{name}>" in call}


def test_the_two_largest_files_are_reflinked_in_parallel(fresh: Fresh, strace: str) -> None:
    directory = fresh("xfs")
    source = make_source(directory)

    traced = trace_fork(strace, source, directory / "fork", calls="ioctl")

    assert_alike(source, directory / "fork")
    by = threads(traced)
    assert traced.calls(FICLONE) == len(by) == 4
    assert by["a"] != by["b"]
    assert by["a"] == by["c"] == by["small"]


def test_on_btrfs_they_are_reflinked_one_after_the_other(fresh: Fresh, strace: str) -> None:
    directory = fresh("btrfs")

    traced = trace_fork(strace, make_source(directory), directory / "fork", calls="ioctl")

    assert len(threads(traced)) == 4
    assert len(set(threads(traced).values())) == 1


@pytest.mark.parametrize("refusing", [("b",), ("a",), ("a", "b")])
def test_a_refused_file_of_the_two_is_copied(fresh: Fresh, strace: str, refusing: tuple[str, ...]) -> None:
    directory = fresh("xfs")
    source, fork = make_source(directory), directory / "fork"

    paths = [in_tree(fork, name) for name in refusing]
    traced = trace_fork(strace, source, fork, calls="ioctl", inject=["ioctl:error=EINVAL"], paths=paths)

    assert_alike(source, fork)
    methods = {path: result["method"] for path, result in traced.files.items()}
    assert methods == {name: "copy" if name in refusing else "reflink" for name in (*LARGE, "small")}
    assert traced.result is not None
    assert traced.result["fallback"] is not None
    assert traced.result["fallback"]["path"] == refusing[0]


@pytest.mark.parametrize("failing", ["a", "b"])
def test_a_failed_file_of_the_two_fails_the_fork(fresh: Fresh, strace: str, failing: str) -> None:
    directory = fresh("xfs")
    fork = directory / "fork"

    paths = [in_tree(fork, failing)]
    traced = trace_fork(strace, make_source(directory), fork, calls="ioctl", inject=["ioctl:error=EIO"], paths=paths)

    assert traced.result is not None
    assert traced.result["error"] is not None
    assert traced.result["error"]["code"] == "io_error"
    assert traced.result["error"]["path"] == str(fork / failing)
    assert traced.files[failing]["error"] == traced.result["error"]
    assert leftovers(directory) == []
    assert not fork.exists()


def test_a_pair_of_filesystems_without_reflinks_is_tried_once_per_thread(fresh: Fresh, strace: str) -> None:
    directory = fresh("xfs")
    source, fork = make_source(directory), directory / "fork"

    paths = [in_tree(fork, name) for name in (*LARGE, "small")]
    traced = trace_fork(strace, source, fork, calls="ioctl", inject=["ioctl:error=EOPNOTSUPP"], paths=paths)

    assert_alike(source, fork)
    assert {result["method"] for result in traced.files.values()} == {"copy"}
    assert traced.calls(FICLONE) == 2
