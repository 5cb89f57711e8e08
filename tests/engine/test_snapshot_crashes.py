"""Forks by snapshot whose process is killed or paused, or that two processes make at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks.copier.endpoints import open_endpoints
from tasks.copier.fork.lifecycle import start
from tasks.copier.fork_spec import ForkResult
from tasks.copier.progress import Progress, Ticker
from tasks.copier.roots import Roots
from tasks.copier.staging.control_directory import control_name
from tasks.copier.staging.gc import collect
from tasks.copier.staging.journal import Phase
from tasks.copier.staging.staging import Staging
from tasks.copier.staging.takeover import take_over
from tests.fixtures.filesystems import Fresh, make_subvolume
from tests.fixtures.processes import wait_until
from tests.support.engine.child_processes import Child
from tests.support.engine.forks import (
    INLINE,
    Ledger,
    assert_alike,
    fork,
    leftovers,
    never_stop,
    spec_of,
)
from tests.support.engine.snapshots import by_snapshot, is_subvolume, make_subvolume_guest
from tests.support.guests import SKIPPED_BY_DEFAULT
from tests.support.tree import snapshot


@pytest.fixture
def directory(fresh: Fresh) -> Path:
    return fresh("btrfs")


@pytest.fixture
def source(directory: Path) -> Path:
    return make_subvolume_guest(directory)


@pytest.mark.parametrize("phase", ["copy", "publish"])
@pytest.mark.parametrize("then", ["the id again", "gc"])
def test_a_killed_fork_is_cleaned_up_by_the_next_one(
    directory: Path, source: Path, phase: str, then: str, every_poll: None
) -> None:
    def kill_self(progress: Progress) -> None:
        if progress["phase"] == phase and progress["files_done"] > 3:
            os.kill(os.getpid(), signal.SIGKILL)

    child = Child(lambda: fork(source, directory / "fork", poll=kill_self))
    with pytest.raises(AssertionError, match="the child ended with -9"):
        child.result()
    assert not (directory / "fork").exists()
    (tree,) = (name for name in leftovers(directory) if name.count(".") == 2)
    half_made = directory / (tree if phase == "publish" else f"{control_name('fork-1')}/snapshot")
    assert is_subvolume(half_made)

    if then == "gc":
        assert [finding.verdict for finding in collect(os.fspath(directory), lambda _: None)] == ["removed"]
    else:
        by_snapshot(source, directory / "fork")
        assert_alike(source, directory / "fork", SKIPPED_BY_DEFAULT)

    assert leftovers(directory) == []
    assert not half_made.exists()


class _KilledAtTheEnd(Ledger):
    """A ledger whose process is killed after the rename, before the result is stored."""

    def store_result(self, result: ForkResult) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def published(directory: Path, source: Path) -> Iterator[Path]:
    """A fork that was published by a process that was killed before it stored the result."""
    destination = directory / "fork"
    child = Child(lambda: _deliver(source, destination, _KilledAtTheEnd()))
    with pytest.raises(AssertionError, match="the child ended with -9"):
        child.result()
    assert is_subvolume(destination)
    assert leftovers(directory) == [control_name("fork-1")]
    yield destination
    assert leftovers(directory) == []


def _deliver(source: Path, destination: Path, ledger: Ledger) -> Ledger:
    spec = spec_of(source, destination)
    with (
        open_endpoints(Roots(), spec.source, spec.destination) as ends,
        Staging.claim(ends.parent_fd, "fork-1", wait=0) as staging,
    ):
        start(ends, staging, spec, INLINE, Ticker(never_stop), ledger)
    return ledger


def test_a_published_fork_is_recognized(source: Path, published: Path) -> None:
    before = published.stat()

    result = _deliver(source, published, Ledger()).result

    assert (result["error"], result["subvolume"]) == (None, True)
    assert published.stat() == before


def test_another_subvolume_at_the_destination_is_not_mistaken_for_the_fork(source: Path, published: Path) -> None:
    """The roots of all subvolumes have the same inode number."""
    published.rename(published.with_name("moved"))
    make_subvolume(published)
    (published / "theirs").touch()

    result = _deliver(source, published, Ledger()).result

    assert result["error"] is not None
    assert os.listdir(published) == ["theirs"]


def test_a_paused_fork_that_is_taken_over_changes_nothing(directory: Path, source: Path, every_poll: None) -> None:
    (reader, writer), (resumed, resume) = os.pipe(), os.pipe()

    def pause(progress: Progress) -> None:
        if progress["phase"] == "copy" and progress["files_done"] == 4:
            os.write(writer, b"!")
            os.read(resumed, 1)

    paused = Child(lambda: fork(source, directory / "fork", poll=pause))
    assert os.read(reader, 1) == b"!"
    parent_fd = os.open(directory, os.O_RDONLY)
    heartbeat = (directory / control_name("fork-1") / "lock").stat().st_mtime_ns

    taken = take_over(parent_fd, "fork-1", heartbeat)

    assert taken is not None
    assert taken.journal is not None
    assert taken.journal.phase is Phase.PLANNING
    assert leftovers(directory) == []
    by_snapshot(source, directory / "fork")
    before = snapshot(directory / "fork")
    os.write(resume, b"!")
    ended = paused.result()
    assert ended["status"] == "failed"
    assert ended["error"] is not None
    assert ended["error"]["code"] == "io_error"
    assert snapshot(directory / "fork") == before
    assert leftovers(directory) == []
    for fd in (parent_fd, reader, writer, resumed, resume):
        os.close(fd)


def test_one_of_two_processes_with_one_id_makes_the_fork(directory: Path, source: Path) -> None:
    def deliver() -> ForkResult:
        wait_until((directory / "go").exists, "the start")
        return fork(source, directory / "fork")

    for turn in range(4):
        children = [Child(deliver) for _ in range(2)]
        (directory / "go").touch()
        results = [child.result() for child in children]

        assert "succeeded" in [result["status"] for result in results]
        assert_alike(source, directory / "fork", SKIPPED_BY_DEFAULT)
        assert leftovers(directory) == []
        (directory / "go").unlink()
        (directory / "fork").rename(directory / f"done-{turn}")
