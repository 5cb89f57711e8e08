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


class Lost(Exception):
    """The process was killed."""


@pytest.fixture
def yard(fresh: Fresh) -> Path:
    yard = fresh("xfs")
    make_guest(yard / "a", seed=1)
    make_guest(yard / "b", seed=2)
    return yard


def leave(yard: Path, phase: Phase) -> None:
    """Leave a fork of `a` to `first` in that phase, with no process at work on it."""
    control, journal = staged_forks.begin_fork(yard / "a", yard / "first")
    if phase == "cloning":
        return

    class Dying(Ledger):
        def store_result(self, result: ForkResult) -> None:
            raise Lost

    with pytest.raises(Lost):
        staged_forks.continue_fork(yard / "a", yard / "first", Dying())
    assert json.loads((control / "journal").read_bytes())["phase"] == "publishing"
    if phase == "publishing":
        (yard / "first").rename(yard / f"{control_name(staged_forks.ID)}.{journal['attempt']}")


def ask(source: Path, destination: Path) -> ForkResult:
    return fork_with_ledger(source, destination, fork_id=staged_forks.ID, limits=CHUNKED, reflink="never").result


@pytest.mark.parametrize("phase", PHASES)
def test_the_other_request_is_made_without_anything_of_the_first(yard: Path, phase: Phase) -> None:
    leave(yard, phase)

    result = ask(yard / "b", yard / "second")

    assert result["status"] == "succeeded"
    assert (result["source"], result["destination"]) == (os.fspath(yard / "b"), os.fspath(yard / "second"))
    assert_alike(yard / "b", yard / "second", SKIPPED_BY_DEFAULT)
    assert (yard / "first").exists() == (phase == "published")
    if phase == "published":
        assert_alike(yard / "a", yard / "first", SKIPPED_BY_DEFAULT)
    assert leftovers(yard) == []


@pytest.mark.parametrize("phase", PHASES)
def test_another_source_for_the_same_destination_is_never_reported_with_the_first_ones_content(
    yard: Path, phase: Phase
) -> None:
    leave(yard, phase)

    result = ask(yard / "b", yard / "first")

    if phase == "published":
        assert result["error"] is not None
        assert result["error"]["code"] == "destination_exists"
        assert_alike(yard / "a", yard / "first", SKIPPED_BY_DEFAULT)
    else:
        assert result["status"] == "succeeded"
        assert_alike(yard / "b", yard / "first", SKIPPED_BY_DEFAULT)
    assert leftovers(yard) == []


def test_other_options_make_another_request(yard: Path) -> None:
    leave(yard, "cloning")

    result = fork_with_ledger(
        yard / "a", yard / "first", fork_id=staged_forks.ID, limits=CHUNKED, reflink="never", skip=("state",)
    ).result

    assert result["status"] == "succeeded"
    assert not (yard / "first" / "state").exists()


@pytest.mark.parametrize("phase", PHASES)
def test_the_same_request_is_continued(yard: Path, phase: Phase) -> None:
    leave(yard, phase)
    tree = _inode(yard)

    assert staged_forks.continue_fork(yard / "a", yard / "first") == "succeeded"

    assert (yard / "first").stat().st_ino == tree
    assert_alike(yard / "a", yard / "first", SKIPPED_BY_DEFAULT)
    assert leftovers(yard) == []


def _inode(yard: Path) -> int:
    trees = [path for path in yard.iterdir() if path.name.startswith(".forkvm") and path.name.count(".") == 2]
    return (trees[0] if trees else yard / "first").stat().st_ino
