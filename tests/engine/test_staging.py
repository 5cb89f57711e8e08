"""The fence: which processes may write into a fork's tree, and when none may any more. The locks are real."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tasks.copier.report import Report
from tasks.copier.staging.control_directory import Held, control_name
from tasks.copier.staging.journal import Phase
from tasks.copier.staging.proof import NotOurs
from tasks.copier.staging.staging import Staging
from tests.fixtures.filesystems import Fresh, SmallTmpfs
from tests.fixtures.processes import wait_until
from tests.support.engine.child_processes import Child
from tests.support.engine.forks import leftovers

NAME = control_name("fork-1")
SPEC: dict[str, Any] = {"fork_id": "fork-1"}


@pytest.fixture
def parent(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path, os.O_RDONLY)
    yield fd
    os.close(fd)


@contextmanager
def other_process(hold: Callable[[], Any]) -> Iterator[None]:
    """Another process that holds the context manager which `hold` makes, during the with block."""
    reader, writer = os.pipe()

    def hold_until_killed() -> None:
        with hold():
            os.write(writer, b"!")
            signal.pause()

    child = Child(hold_until_killed)
    try:
        assert os.read(reader, 1) == b"!"
        yield
    finally:
        child.kill()
        os.close(reader)
        os.close(writer)


def test_a_claim_makes_a_private_control_directory(parent: int, tmp_path: Path) -> None:
    with Staging.claim(parent, "fork-1", wait=0) as staging:
        assert staging.journal() is None
        assert (tmp_path / NAME).stat().st_mode & 0o7777 == 0o700
        staging.remove()

    assert leftovers(tmp_path) == []


def test_names_of_staging_depend_only_on_the_id() -> None:
    assert control_name("fork-1") == NAME
    assert control_name("fork-2") != NAME
    assert len(os.fsencode(control_name("x" * 10_000))) < 64
    assert control_name("/../\udcff").startswith(".forkvm-")


def test_no_other_process_claims_or_attaches_while_the_claim_is_held(parent: int) -> None:
    with other_process(lambda: Staging.claim(parent, "fork-1", wait=0)):
        with pytest.raises(Held), Staging.claim(parent, "fork-1", wait=0.05):
            pass
        with pytest.raises(Held), Staging.attach(parent, "fork-1", wait=0):
            pass


def test_chunks_share_the_fence_and_keep_the_publisher_out(parent: int) -> None:
    with Staging.claim(parent, "fork-1", wait=0):
        pass
    with other_process(lambda: Staging.attach(parent, "fork-1", wait=0)):
        with Staging.attach(parent, "fork-1", wait=0) as staging:
            assert staging is not None
        with pytest.raises(Held), Staging.attach(parent, "fork-1", wait=0, alone=True):
            pass
        with pytest.raises(Held), Staging.claim(parent, "fork-1", wait=0):
            pass


def test_the_fence_opens_when_its_holder_is_killed(parent: int) -> None:
    with other_process(lambda: Staging.claim(parent, "fork-1", wait=0)):
        pass

    with Staging.claim(parent, "fork-1", wait=5) as staging:
        assert staging.name == NAME


def test_a_late_chunk_fails_to_attach_after_the_publish(parent: int, tmp_path: Path) -> None:
    with Staging.attach(parent, "fork-1", wait=0) as staging:
        assert staging is None

    late = Child(lambda: _attaches(parent, tmp_path))  # before the claim: a child inherits its parent's locks
    with Staging.claim(parent, "fork-1", wait=0) as claimed:
        (tmp_path / "go").touch()
        assert not late.is_done(0.2)  # it waits for the lock
        claimed.remove()

    assert late.result() is False


def _attaches(parent: int, directory: Path) -> bool:
    wait_until((directory / "go").exists, "the start signal")
    with Staging.attach(parent, "fork-1", wait=10) as staging:
        return staging is not None


def test_a_process_that_waited_for_a_removed_staging_claims_a_new_one(parent: int, tmp_path: Path) -> None:
    late = Child(lambda: _claims(parent, tmp_path))
    with Staging.claim(parent, "fork-1", wait=0) as first:
        inode = os.fstat(first.fd).st_ino
        keep = os.open(".", os.O_RDONLY, dir_fd=first.fd)  # so that the number is not reused
        (tmp_path / "go").touch()
        assert not late.is_done(0.2)
        first.remove()

    assert late.result() != inode
    os.close(keep)
    assert leftovers(tmp_path) == [NAME]


def _claims(parent: int, directory: Path) -> int:
    wait_until((directory / "go").exists, "the start signal")
    with Staging.claim(parent, "fork-1", wait=10) as staging:
        return os.fstat(staging.fd).st_ino


def test_a_chunk_is_held_by_one_process_and_counts_its_attempts(parent: int) -> None:
    @contextmanager
    def in_chunk() -> Iterator[int | None]:
        with Staging.attach(parent, "fork-1", wait=0) as staging:
            assert staging is not None
            with staging.hold_chunk(7) as begun:
                assert begun is not None
                yield begun

    with Staging.claim(parent, "fork-1", wait=0):
        pass
    with other_process(in_chunk), Staging.attach(parent, "fork-1", wait=0) as staging:
        assert staging is not None
        with staging.hold_chunk(7) as begun:
            assert begun is None
        with staging.hold_chunk(8) as begun:
            assert begun == 1
    with in_chunk() as begun:
        assert begun == 2
    with in_chunk() as begun:
        assert begun == 3


def test_a_chunk_whose_count_was_lost_by_power_loss_counts_as_started(parent: int, tmp_path: Path) -> None:
    with Staging.claim(parent, "fork-1", wait=0) as staging:
        with staging.hold_chunk(7) as begun:
            assert begun == 1
        os.truncate(tmp_path / NAME / "chunk-7", 0)

        with staging.hold_chunk(7) as begun:
            assert begun == 2


def test_a_new_attempt_removes_the_earlier_one_and_continues_its_count(parent: int, tmp_path: Path) -> None:
    with Staging.claim(parent, "fork-1", wait=0) as staging:
        first = staging.begin(SPEC, None)
        os.close(staging.make_tree(first))
        (tmp_path / staging.tree_name(first) / "half.raw").write_bytes(b"half")
        staging.write_report("0", Report())
        staging.stop()
        with staging.hold_chunk(0):
            pass

        second = staging.begin(SPEC, first)

        assert (first.tries, second.tries) == (1, 2)
        assert first.attempt != second.attempt
        assert leftovers(tmp_path) == [NAME]
        assert not staging.has_report("0")
        assert not staging.is_stopped()
        with staging.hold_chunk(0) as begun:
            assert begun == 1
        assert staging.journal() == second
        assert second.control == (tmp_path / NAME).stat().st_ino
        assert second.phase is Phase.PLANNING


def test_a_journal_truncated_by_power_loss_is_ignored(parent: int, tmp_path: Path) -> None:
    with Staging.claim(parent, "fork-1", wait=0) as staging:
        journal = staging.begin(SPEC, None)
        written = (tmp_path / NAME / "journal").read_bytes()
        for length in (0, 1, len(written) // 2, len(written) - 1):
            (tmp_path / NAME / "journal").write_bytes(written[:length])
            assert staging.journal() is None
        (tmp_path / NAME / "journal").write_bytes(b"[]")
        assert staging.journal() is None
        (tmp_path / NAME / "journal").write_bytes(written)
        assert staging.journal() == journal


def test_reports_are_read_back_unchanged(parent: int) -> None:
    report = Report()
    report.totals.copied = 3
    with Staging.claim(parent, "fork-1", wait=0) as staging:
        assert not staging.has_report("plan")
        with pytest.raises(FileNotFoundError):
            staging.report("plan")

        staging.write_report("plan", report)

        assert staging.has_report("plan")
        assert staging.report("plan").totals.copied == 3


def test_a_tree_is_private_until_it_is_published_with_the_same_inode(parent: int, tmp_path: Path) -> None:
    with Staging.claim(parent, "fork-1", wait=0) as staging:
        journal = staging.begin(SPEC, None)
        tree = staging.make_tree(journal)
        os.fchmod(tree, 0o700)
        journal = replace(journal, tree=os.fstat(tree).st_ino)
        os.close(tree)
        assert (tmp_path / staging.tree_name(journal)).stat().st_mode & 0o7777 == 0o700
        assert not staging.is_published(journal, "fork")

        staging.publish(journal, "fork", sync=True)

        assert staging.is_published(journal, "fork")
        assert not staging.is_published(replace(journal, tree=1), "fork")
        with pytest.raises(FileNotFoundError):
            staging.open_tree(journal)
        with pytest.raises(FileNotFoundError):
            staging.publish(journal, "fork-2", sync=False)
        staging.remove()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fork"]


@pytest.mark.parametrize("taken", ["directory", "empty directory", "file", "dangling symlink"])
def test_a_publish_replaces_nothing(fresh: Fresh, taken: str) -> None:
    directory = fresh("xfs")
    destination = directory / "fork"
    if taken == "file":
        destination.touch()
    elif taken == "dangling symlink":
        destination.symlink_to("nowhere")
    else:
        destination.mkdir()
        if taken == "directory":
            (destination / "theirs").touch()
    before = os.lstat(destination)
    fd = os.open(directory, os.O_RDONLY)
    try:
        with Staging.claim(fd, "fork-1", wait=0) as staging:
            journal = staging.begin(SPEC, None)
            os.close(staging.make_tree(journal))

            with pytest.raises(FileExistsError):
                staging.publish(journal, "fork", sync=False)

            os.close(staging.open_tree(journal))
            assert os.lstat(destination) == before
    finally:
        os.close(fd)


def test_notes_truncated_by_a_full_disk_are_an_error_and_hide_no_later_note(small_tmpfs: SmallTmpfs) -> None:
    directory = small_tmpfs(64 << 10)
    filler = directory / "filler"
    parent = os.open(directory, os.O_RDONLY)
    with Staging.claim(parent, "fork-1", 0.0) as staging:
        tree = staging.new_tree_name()
        os.close(staging.make_named_tree(tree))
        (directory / tree / "data").touch()
        (directory / tree).chmod(0o755)
        staging.note(b"the lock file has a page of memory\n")
        with filler.open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))

        # When there is room for the first of the lines only
        with pytest.raises(OSError, match="No space left"):
            staging.note_trees({staging.new_tree_name(): n for n in range(1 << 40, (1 << 40) + 1000)})
        filler.unlink()
        staging.note_trees({tree: (directory / tree).stat().st_ino})

        # Then
        staging.discard_trees()
        assert not (directory / tree).exists()
    os.close(parent)


@pytest.mark.parametrize("name", ["stop", "chunk-3", None])
def test_a_control_directory_that_got_only_a_journal_is_removed_with_what_others_added(
    parent: int, tmp_path: Path, name: str | None
) -> None:
    with Staging.claim(parent, "fork-1", wait=0) as staging:
        staging.begin(SPEC, None)
        if name is not None:
            (tmp_path / NAME / name).touch(0o600)

        staging.remove(alone=True)

    assert os.listdir(tmp_path) == []


def test_a_control_directory_with_a_foreign_file_is_kept_even_if_it_got_only_a_journal(
    parent: int, tmp_path: Path
) -> None:
    with Staging.claim(parent, "fork-1", wait=0) as staging:
        staging.begin(SPEC, None)
        (tmp_path / NAME / "diary").touch(0o600)

        with pytest.raises(NotOurs, match="diary"):
            staging.remove(alone=True)

    assert os.listdir(tmp_path / NAME) == ["diary"]
