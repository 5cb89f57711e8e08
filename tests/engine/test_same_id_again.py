"""An id is used again for another request, after Redis lost its data and while the staging of the first one exists."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Literal

import pytest

from tasks.copier.fork_spec import ForkResult
from tasks.copier.staging.control_directory import control_name
from tests.fixtures.filesystems import Fresh
from tests.support.engine import staged_forks
from tests.support.engine.forks import CHUNKED, Ledger, assert_alike, fork_with_ledger, leftovers
from tests.support.guests import SKIPPED_BY_DEFAULT, make_guest

Phase = Literal["cloning", "publishing", "published"]
PHASES: list[Phase] = ["cloning", "publishing", "published"]


class Killed(Exception):
    """The process was killed."""


@pytest.fixture
def workdir(fresh: Fresh) -> Path:
    workdir = fresh("xfs")
    make_guest(workdir / "a", seed=1)
    make_guest(workdir / "b", seed=2)
    return workdir


def make_unfinished(workdir: Path, phase: Phase) -> None:
    """Leave a fork of `a` to `first` in that phase, with no process at work on it."""
    control, journal = staged_forks.begin_fork(workdir / "a", workdir / "first")
    if phase == "cloning":
        return

    class KilledLedger(Ledger):
        def store_result(self, result: ForkResult) -> None:
            raise Killed

    with pytest.raises(Killed):
        staged_forks.continue_fork(workdir / "a", workdir / "first", KilledLedger())
    assert json.loads((control / "journal").read_bytes())["phase"] == "publishing"
    if phase == "publishing":
        (workdir / "first").rename(workdir / f"{control_name(staged_forks.ID)}.{journal['attempt']}")


def make_fork(source: Path, destination: Path) -> ForkResult:
    return fork_with_ledger(source, destination, fork_id=staged_forks.ID, limits=CHUNKED, reflink="never").result


@pytest.mark.parametrize("phase", PHASES)
def test_the_other_request_is_made_without_anything_of_the_first(workdir: Path, phase: Phase) -> None:
    make_unfinished(workdir, phase)

    result = make_fork(workdir / "b", workdir / "second")

    assert result["status"] == "succeeded"
    assert (result["source"], result["destination"]) == (os.fspath(workdir / "b"), os.fspath(workdir / "second"))
    assert_alike(workdir / "b", workdir / "second", SKIPPED_BY_DEFAULT)
    assert (workdir / "first").exists() == (phase == "published")
    if phase == "published":
        assert_alike(workdir / "a", workdir / "first", SKIPPED_BY_DEFAULT)
    assert leftovers(workdir) == []


@pytest.mark.parametrize("phase", PHASES)
def test_another_source_for_the_same_destination_is_never_reported_with_the_first_ones_content(
    workdir: Path, phase: Phase
) -> None:
    make_unfinished(workdir, phase)

    result = make_fork(workdir / "b", workdir / "first")

    if phase == "published":
        assert result["error"] is not None
        assert result["error"]["code"] == "destination_exists"
        assert_alike(workdir / "a", workdir / "first", SKIPPED_BY_DEFAULT)
    else:
        assert result["status"] == "succeeded"
        assert_alike(workdir / "b", workdir / "first", SKIPPED_BY_DEFAULT)
    assert leftovers(workdir) == []


def test_other_options_make_another_request(workdir: Path) -> None:
    make_unfinished(workdir, "cloning")

    result = fork_with_ledger(
        workdir / "a", workdir / "first", fork_id=staged_forks.ID, limits=CHUNKED, reflink="never", skip=("state",)
    ).result

    assert result["status"] == "succeeded"
    assert not (workdir / "first" / "state").exists()


@pytest.mark.parametrize("phase", PHASES)
def test_the_same_request_is_continued(workdir: Path, phase: Phase) -> None:
    make_unfinished(workdir, phase)
    tree = _inode(workdir)

    assert staged_forks.continue_fork(workdir / "a", workdir / "first") == "succeeded"

    assert (workdir / "first").stat().st_ino == tree
    assert_alike(workdir / "a", workdir / "first", SKIPPED_BY_DEFAULT)
    assert leftovers(workdir) == []


def _inode(workdir: Path) -> int:
    trees = [path for path in workdir.iterdir() if path.name.startswith(".forkvm") and path.name.count(".") == 2]
    return (trees[0] if trees else workdir / "first").stat().st_ino
