"""A large source is cloned while it is still walked: the fork is then the source at one moment, or it fails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tasks.copier.fork import source_changes
from tasks.copier.options import Limits
from tasks.copier.progress import Progress
from tests.fixtures.filesystems import Fresh
from tests.fixtures.processes import wait_until
from tests.support.engine.forks import assert_alike, forked, refused
from tests.support.engine.source_writers import wait_for_clock_tick

#: Chunks of 20 files are started as soon as the walk has found 10.
LIMITS = Limits(inline_files=10, inline_bytes=0, chunk_files=20)
#: Polls before the change, one per directory of ten files: by then the first chunks have been sent.
_POLLS = 7
pytestmark = pytest.mark.usefixtures("every_poll")


@pytest.fixture(autouse=True)
def _as_if_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """No fork is small enough to be compared as a whole again."""
    monkeypatch.setattr(source_changes, "MOST_FILES", 0)


@pytest.fixture
def source(fresh: Fresh) -> Path:
    source = fresh("xfs") / "source"
    for directory in range(10):
        (source / f"layer-{directory}").mkdir(parents=True)
        for n in range(10):
            (source / f"layer-{directory}" / f"block-{n}").write_bytes(b"as it was")
    (source / "largest").write_bytes(b"as it was" * 1000)
    wait_for_clock_tick()
    return source


class ChangeDuringWalk:
    """Changes something once, when the walk continues and the first chunk is done."""

    def __init__(self, directory: Path, change: Callable[[Path], None]) -> None:
        self._directory = directory
        self._change = change
        self._polls = 0
        self.done = False

    def __call__(self, progress: Progress) -> None:
        self._polls += progress["phase"] == "plan"
        if self.done or self._polls < _POLLS:
            return
        wait_until(lambda: any(self._directory.glob(".forkvm-*/report-0")), "the first chunk")
        self.done = True
        self._change(next(self._directory.glob(".forkvm-*.*")))


def _cloned_block(tree: Path) -> str:
    return next(str(path.relative_to(tree)) for path in sorted(tree.rglob("block-*")))


@pytest.mark.parametrize("which", ["a file of a chunk that is done", "the file that was asked for a reflink first"])
def test_a_file_that_changes_between_its_clone_and_the_end_of_the_walk_fails_the_fork(source: Path, which: str) -> None:
    """Otherwise the fork could have one file as it was before a change, and another as it was after a later one."""

    def change(tree: Path) -> None:
        name = _cloned_block(tree) if which.startswith("a file") else "largest"
        with (source / name).open("r+b") as file:
            file.write(b"changed")

    change_during_walk = ChangeDuringWalk(source.parent, change)
    error = refused(source, source.parent / "fork", poll=change_during_walk, limits=LIMITS)

    assert change_during_walk.done
    assert error["code"] == "source_changed"


def test_an_unchanged_large_source_is_forked(source: Path) -> None:
    forked(source, source.parent / "fork", limits=LIMITS)

    assert_alike(source, source.parent / "fork")
