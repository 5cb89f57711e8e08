"""A fork is all or nothing: one that is killed, raced or cancelled leaves a complete fork or none, and never two."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from tasks.copier import child_processes
from tasks.copier.errors import Code, ForkError
from tasks.copier.fork_spec import ForkResult
from tasks.copier.options import Limits
from tasks.copier.progress import Progress
from tests.fixtures.filesystems import Fresh
from tests.fixtures.processes import wait_until
from tests.support.engine.child_processes import Child, children_of_this_process
from tests.support.engine.forks import CHUNKED, INLINE, MIB, assert_alike, fork, fork_with_ledger, forked, leftovers
from tests.support.guests import SKIPPED_BY_DEFAULT, GuestSizes, make_guest, make_sparse_file
from tests.support.tree import snapshot

SIZES = GuestSizes(overlay=32 * MIB, overlay_data=6 * MIB, memory=16 * MIB, memory_data=6 * MIB)


@pytest.fixture
def directory(fresh: Fresh) -> Path:
    return fresh("ext4")


@pytest.fixture
def source(directory: Path) -> Path:
    source = make_guest(directory / "source", SIZES)
    os.link(source / "state", source / "state.linked")
    (source / "link").symlink_to("state")
    return source


def settled(source: Path, destination: Path, **arguments: object) -> ForkResult:
    """The fork after the children of a killed fork have ended and released its lock."""
    deadline = time.monotonic() + 10
    while True:
        result = fork(source, destination, **arguments)  # type: ignore[arg-type]
        held = result["error"] is not None and "another process" in result["error"]["message"]
        if not held or time.monotonic() > deadline:
            return result
        time.sleep(0.01)


@pytest.mark.parametrize("phase", ["plan", "copy", "publish"])
def test_a_killed_fork_leaves_no_destination_and_its_id_can_be_used_again(
    directory: Path, source: Path, phase: str, limits: Limits, every_poll: None
) -> None:
    def kill_self(progress: Progress) -> None:
        if progress["phase"] == phase and (phase != "copy" or progress["bytes_done"] > MIB):
            os.kill(os.getpid(), signal.SIGKILL)

    child = Child(lambda: fork(source, directory / "fork", poll=kill_self, limits=limits, reflink="never"))
    with pytest.raises(AssertionError, match="the child ended with -9"):
        child.result()
    assert not (directory / "fork").exists()
    assert leftovers(directory) != []

    result = settled(source, directory / "fork", limits=limits, reflink="never")

    assert result["status"] == "succeeded"
    assert_alike(source, directory / "fork", SKIPPED_BY_DEFAULT)
    assert leftovers(directory) == []


def test_a_fork_killed_at_any_moment_is_complete_or_absent(directory: Path, source: Path) -> None:
    rng, outcomes = random.Random(7), set()
    for number in range(40):
        destination, limits = directory / f"fork-{number}", (INLINE, CHUNKED)[number % 2]
        child = Child(lambda: fork(source, destination, limits=limits))  # noqa: B023 - forked here and now
        time.sleep(rng.uniform(0, 0.06))
        child.kill()

        published = destination.exists()
        if published:
            assert_alike(source, destination, SKIPPED_BY_DEFAULT)
        result = settled(source, destination, limits=limits)
        if result["error"] is not None:
            assert (published, result["error"]["code"]) == (True, "destination_exists")
        assert_alike(source, destination, SKIPPED_BY_DEFAULT)
        assert leftovers(directory) == []
        outcomes.add(published)

    assert False in outcomes


def test_a_fork_that_kills_its_process_each_time_fails_as_worker_lost(
    directory: Path, source: Path, every_poll: None
) -> None:
    def kill_self(progress: Progress) -> None:
        if progress["phase"] == "copy":
            os.kill(os.getpid(), signal.SIGKILL)

    for _ in range(4):
        child = Child(lambda: fork(source, directory / "fork", poll=kill_self))
        with pytest.raises(AssertionError, match="the child ended with -9"):
            child.result()

    result = fork(source, directory / "fork")

    assert result["error"] is not None
    assert (result["error"]["code"], result["error"]["path"]) == ("worker_lost", str(source))
    assert leftovers(directory) == []
    forked(source, directory / "fork")


def test_the_chunk_of_a_killed_child_is_made_by_another(directory: Path, every_poll: None) -> None:
    source = directory / "source"
    source.mkdir()
    make_sparse_file(source / "disk.raw", 256 * MIB, 160 * MIB)
    killed: list[int] = []
    others = children_of_this_process()

    def kill_one(progress: Progress) -> None:
        children = [pid for pid in children_of_this_process() if pid not in others]
        if progress["phase"] == "copy" and children and not killed:
            killed.append(children[0])
            os.kill(killed[0], signal.SIGKILL)

    result = forked(source, directory / "fork", poll=kill_one, limits=CHUNKED, reflink="never")

    assert killed
    assert_alike(source, directory / "fork")
    assert result["files"]["copied"] == 1


def test_the_chunk_of_a_stopped_child_is_made_by_another_without_waiting(
    directory: Path, every_poll: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child_processes, "STOPPED_SECONDS", 0.3)
    source = directory / "source"
    source.mkdir()
    make_sparse_file(source / "disk.raw", 256 * MIB, 160 * MIB)
    stopped: list[int] = []
    others = children_of_this_process()

    def stop_one(progress: Progress) -> None:
        children = [pid for pid in children_of_this_process() if pid not in others]
        if progress["phase"] == "copy" and children and not stopped:
            stopped.append(children[0])
            os.kill(stopped[0], signal.SIGSTOP)

    result = forked(source, directory / "fork", poll=stop_one, limits=CHUNKED, reflink="never")

    assert stopped
    assert stopped[0] not in children_of_this_process()
    assert_alike(source, directory / "fork")
    assert result["files"]["copied"] == 1


def test_no_child_outlives_a_fork_whose_tree_was_replaced_while_it_was_planned(
    directory: Path, every_poll: None
) -> None:
    # Given a source with chunks that are started during the walk
    source = directory / "source"
    for number in range(40):
        (source / f"{number}").mkdir(parents=True)
        (source / f"{number}" / "file").write_bytes(b"data")
    others = children_of_this_process()
    moved: list[Path] = []

    def replace_tree(progress: Progress) -> None:
        if not moved and set(children_of_this_process()) - set(others):
            (tree,) = (path for path in directory.glob(".forkvm-*.*") if path.is_dir())
            moved.append(tree.rename(directory / "moved"))
            tree.mkdir()

    # When
    result = fork(source, directory / "fork", poll=replace_tree, limits=CHUNKED, reflink="never")

    # Then
    assert moved
    assert result["error"] is not None
    assert "not the directory that this fork was made in" in result["error"]["message"]
    assert children_of_this_process() == others


@pytest.mark.parametrize("count", [2, 6])
def test_of_forks_to_one_destination_exactly_one_wins(
    directory: Path, source: Path, count: int, limits: Limits
) -> None:
    def compete(number: int) -> ForkResult:
        wait_until((directory / "go").exists, "the start")
        return fork(source, directory / "fork", fork_id=f"fork-{number}", limits=limits)

    for _ in range(5):
        children = [Child(lambda number=number: compete(number)) for number in range(count)]  # type: ignore[misc]
        (directory / "go").touch()
        results = [child.result() for child in children]

        assert sorted(result["status"] for result in results) == ["failed"] * (count - 1) + ["succeeded"]
        assert {result["error"]["code"] for result in results if result["error"]} == {"destination_exists"}
        assert_alike(source, directory / "fork", SKIPPED_BY_DEFAULT)
        assert leftovers(directory) == []
        (directory / "go").unlink()
        (directory / "fork").rename(directory / f"done-{time.monotonic_ns()}")


def test_two_processes_with_one_id_make_one_complete_fork(directory: Path, source: Path, limits: Limits) -> None:
    def deliver() -> ForkResult:
        wait_until((directory / "go").exists, "the start")
        return fork(source, directory / "fork", limits=limits)

    for _ in range(8):
        children = [Child(deliver) for _ in range(2)]
        (directory / "go").touch()
        results = [child.result() for child in children]

        assert "succeeded" in [result["status"] for result in results]
        assert_alike(source, directory / "fork", SKIPPED_BY_DEFAULT)
        assert leftovers(directory) == []
        (directory / "go").unlink()
        (directory / "fork").rename(directory / f"done-{time.monotonic_ns()}")


def test_an_entry_created_at_the_destination_during_the_fork_is_kept(
    directory: Path, source: Path, limits: Limits, every_poll: None
) -> None:
    destination = directory / "fork"

    def take(progress: Progress) -> None:
        if progress["phase"] == "publish" and not destination.is_symlink():
            destination.symlink_to("nowhere")

    result = fork(source, destination, poll=take, limits=limits)

    assert result["error"] is not None
    assert result["error"]["code"] == "destination_exists"
    assert os.readlink(destination) == "nowhere"
    assert leftovers(directory) == []


@pytest.mark.parametrize("phase", ["plan", "copy", "publish"])
def test_a_cancelled_fork_leaves_nothing(
    directory: Path, source: Path, phase: str, limits: Limits, every_poll: None
) -> None:
    before = snapshot(source)

    def cancel(progress: Progress) -> None:
        if progress["phase"] == phase:
            raise ForkError(Code.CANCELLED, "cancelled on request")

    result = fork(source, directory / "fork", poll=cancel, limits=limits, reflink="never")

    assert result["status"] == "cancelled"
    assert result["error"] is not None
    assert result["error"]["code"] == "cancelled"
    assert [path.name for path in directory.iterdir()] == ["source"]
    assert snapshot(source) == before
    forked(source, directory / "fork", limits=limits)


def test_a_fork_cancelled_while_its_last_results_are_stored_leaves_nothing(
    directory: Path, source: Path, limits: Limits
) -> None:
    ledger = fork_with_ledger(source, directory / "fork", limits=limits, ended=True)

    assert ledger.result["status"] == "cancelled"
    assert [path.name for path in directory.iterdir()] == ["source"]


def test_a_partial_fork_is_never_visible(directory: Path, source: Path, limits: Limits) -> None:
    """A process that lists the destination repeatedly sees nothing, or the complete fork with its final modes."""
    wanted = {str(path.relative_to(source)) for path in source.rglob("*")}
    wanted = {path for path in wanted if os.fsencode(path) not in SKIPPED_BY_DEFAULT}

    def watch() -> set[str] | None:
        wait_until((directory / "fork").exists, "the fork")
        return {str(path.relative_to(directory / "fork")) for path in (directory / "fork").rglob("*")}

    watcher = Child(watch)
    forked(source, directory / "fork", limits=limits)

    assert watcher.result() == wanted


def test_simultaneous_forks_of_one_source_do_not_conflict(directory: Path, source: Path) -> None:
    def deliver(number: int) -> ForkResult:
        return fork(source, directory / f"fork-{number}", fork_id=f"fork-{number}", limits=CHUNKED)

    results = [child.result() for child in [Child(lambda n=n: deliver(n)) for n in range(6)]]  # type: ignore[misc]

    assert [result["status"] for result in results] == ["succeeded"] * 6
    for number in range(6):
        assert_alike(source, directory / f"fork-{number}", SKIPPED_BY_DEFAULT)
    assert leftovers(directory) == []


def test_corruption_during_the_copy_is_found_only_by_verify(directory: Path, source: Path, every_poll: None) -> None:
    """`verify: content` reads every byte back. A flipped byte in the tree simulates a disk that returns wrong data."""

    def corrupt(progress: Progress) -> None:
        for path in directory.glob(".forkvm-*.*/config.ext4"):
            if path.stat().st_blocks:
                with path.open("r+b") as file:
                    file.write(b"a flipped bit")

    result = fork(source, directory / "fork", poll=corrupt, reflink="never", verify="content")

    assert result["error"] is not None
    assert result["error"]["code"] == "verify_failed"
    assert result["error"]["path"] == str(directory / "fork" / "config.ext4")
    assert "byte 0" in result["error"]["message"]
    assert [path.name for path in directory.iterdir()] == ["source"]
    forked(source, directory / "fork", poll=corrupt, reflink="never")


@pytest.mark.parametrize("reflink", ["auto", "never"])
def test_verify_and_sync_do_not_change_a_successful_fork(fs: Path, limits: Limits, reflink: str) -> None:
    source = make_guest(fs / "source", SIZES)

    forked(source, fs / "fork", limits=limits, reflink=reflink, verify="content", durability="sync")

    assert_alike(source, fs / "fork", SKIPPED_BY_DEFAULT)


def test_no_fork_leaks_a_descriptor_or_a_child(directory: Path, source: Path, limits: Limits) -> None:
    before = set(os.listdir("/proc/self/fd"))

    forked(source, directory / "fork", limits=limits)
    fork(source, directory / "fork", limits=limits)
    fork(source, directory / "fork-2", limits=limits, reflink="always")

    assert set(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
