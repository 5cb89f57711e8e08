"""A user removes or replaces the staging of a fork, or creates its destination, while it is made."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tasks.copier.endpoints import Endpoints
from tasks.copier.fork import close
from tasks.copier.fork.lifecycle import finish
from tasks.copier.options import Limits
from tasks.copier.progress import Progress, Ticker
from tasks.copier.staging.staging import Staging
from tests.fixtures.filesystems import Fresh
from tests.fixtures.processes import wait_until
from tests.support.engine.forks import Ledger, assert_alike, fork, forked, leftovers, never_stop
from tests.support.engine.local_campaigns import campaign, destinations
from tests.support.engine.staged_forks import ID, begin_fork
from tests.support.engine.traced_processes import TracedChild
from tests.support.guests import SKIPPED_BY_DEFAULT, make_guest
from tests.support.requirements import require_command
from tests.support.system.staging_view import StagingView
from tests.support.tree import snapshot


@pytest.fixture
def workdir(fresh: Fresh) -> Path:
    workdir = fresh("xfs")
    make_guest(workdir / "source")
    (workdir / "parent").mkdir()
    make_guest(workdir / "outside")
    return workdir


def _control(parent: Path) -> Path:
    return next(path for path in parent.glob(".forkvm-*") if path.name.count(".") == 1)


def _tree(parent: Path) -> Path:
    return next(parent.glob(".forkvm-*.*"))


def _replace(path: Path, outside: Path) -> None:
    shutil.rmtree(path)
    path.symlink_to(outside)


def _replace_parent(parent: Path, outside: Path) -> None:
    parent.rename(parent.with_name("moved"))
    parent.symlink_to(outside)


#: The action, given the destination's parent and a directory elsewhere.
ACTIONS: dict[str, Callable[[Path, Path], object]] = {
    "the control directory removed": lambda parent, _: shutil.rmtree(_control(parent)),
    "the control directory replaced by a symlink": lambda parent, outside: _replace(_control(parent), outside),
    "the tree removed": lambda parent, _: shutil.rmtree(_tree(parent)),
    "the tree replaced by a symlink": lambda parent, outside: _replace(_tree(parent), outside),
    "the parent removed": lambda parent, _: shutil.rmtree(parent),
}


@pytest.mark.parametrize("phase", ["plan", "copy", "publish"])
@pytest.mark.parametrize("action", ACTIONS)
def test_a_fork_whose_staging_is_removed_or_replaced_fails_and_touches_nothing_else(
    workdir: Path,
    action: str,
    phase: str,
    limits: Limits,
    every_poll: None,
) -> None:
    parent, outside = workdir / "parent", workdir / "outside"
    before = snapshot(outside)
    done: list[str] = []

    def act(progress: Progress) -> None:
        if progress["phase"] == phase and not done:
            done.append(action)
            ACTIONS[action](parent, outside)

    result = fork(workdir / "source", parent / "fork", poll=act, limits=limits, reflink="never")

    assert done
    assert result["error"] is not None, "it succeeded"
    assert result["error"]["code"] == "io_error"
    assert result["error"]["path"].startswith(str(parent)), "it names the source"
    assert "unexpected" not in result["error"]["message"]
    assert snapshot(outside) == before
    assert not (parent / "fork").exists()
    shutil.rmtree(parent, ignore_errors=True)
    parent.mkdir(exist_ok=True)
    forked(workdir / "source", parent / "fork")


def test_a_fork_that_lost_its_staging_opens_its_tree_to_no_other_user(
    workdir: Path, limits: Limits, every_poll: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`gc` cannot prove a tree with its final mode to be staging, and this process may be killed next."""
    parent, opened = workdir / "parent", list[str]()
    monkeypatch.setattr(close, "refuse_changes", lambda *_: opened.append("the step after the final mode"))

    def act(progress: Progress) -> None:
        if progress["phase"] == "copy":
            for path in parent.glob(".forkvm-*"):
                if path.name.count(".") == 1:
                    path.rename(workdir / path.name)

    result = fork(workdir / "source", parent / "fork", poll=act, limits=limits, reflink="never")

    assert result["error"] is not None
    assert result["error"]["code"] == "io_error"
    assert opened == []


@pytest.mark.parametrize("phase", ["plan", "copy", "publish"])
def test_a_fork_whose_parent_is_replaced_by_a_symlink_is_made_in_the_original_parent(
    workdir: Path,
    phase: str,
    limits: Limits,
    every_poll: None,
) -> None:
    parent, outside = workdir / "parent", workdir / "outside"
    before = snapshot(outside)
    done: list[str] = []

    def act(progress: Progress) -> None:
        if progress["phase"] == phase and not done:
            done.append(phase)
            _replace_parent(parent, outside)

    result = fork(workdir / "source", parent / "fork", poll=act, limits=limits)

    assert done
    assert result["error"] is None
    assert snapshot(outside) == before
    assert_alike(workdir / "source", workdir / "moved" / "fork", SKIPPED_BY_DEFAULT)
    assert leftovers(workdir / "moved") == []


@pytest.mark.parametrize("taken", ["a directory", "a file", "a dangling symlink"])
def test_a_destination_created_at_the_rename_is_not_changed(
    workdir: Path,
    taken: str,
    limits: Limits,
    tmp_path: Path,
) -> None:
    """The call is delayed at its entry to the kernel until the destination exists."""
    strace = require_command("strace", "a system call that waits")
    destination = workdir / "parent" / "fork"
    inject = ["renameat2:delay_enter=500000"]
    traced = TracedChild(
        strace,
        tmp_path / "trace",
        lambda: fork(workdir / "source", destination, limits=limits),
        calls="renameat2",
        inject=inject,
    )
    staging = StagingView(workdir / "parent", "fork-1")

    traced.begin()
    wait_until(lambda: staging.phase == "publishing", "the step before the rename", timeout=10)
    if taken == "a directory":
        destination.mkdir()
    elif taken == "a file":
        destination.write_bytes(b"theirs")
    else:
        destination.symlink_to("nowhere")
    before = destination.lstat()
    result = traced.result()

    assert result["error"] is not None
    assert result["error"]["code"] == "destination_exists"
    assert destination.lstat() == before
    assert leftovers(workdir / "parent") == []


def test_a_fork_whose_tree_was_moved_between_two_chunks_fails_instead_of_waiting_for_them(workdir: Path) -> None:
    """Each chunk would find no tree, could report nothing, and would be sent again."""
    # Given
    destination = workdir / "parent" / "fork"
    begin_fork(workdir / "source", destination)
    _tree(workdir / "parent").rename(workdir / "moved")
    ledger, fd = Ledger(), os.open(workdir / "parent", os.O_RDONLY)

    # When
    try:
        with Staging.attach(fd, ID, 0, alone=True) as staging:
            assert staging is not None
            ends = Endpoints("", str(destination), -1, fd, destination.name)
            result = finish(ends, staging, Ticker(never_stop), ledger)
    finally:
        os.close(fd)

    # Then
    assert result is not None
    assert result["error"] is not None
    assert (result["error"]["code"], result["error"]["path"]) == ("io_error", str(destination))
    assert leftovers(workdir / "parent") == []


def _remove_meanwhile(parent: Path) -> None:
    """Remove a directory in which others still make entries."""
    while parent.exists():
        shutil.rmtree(parent, ignore_errors=True)


def test_a_parent_that_is_removed_while_a_campaign_runs_is_an_error_of_each_destination(workdir: Path) -> None:
    paths = destinations(workdir / "parent", 10)

    result = campaign(workdir / "source", paths, poll=lambda _: _remove_meanwhile(workdir / "parent"))

    assert [failure["error"]["code"] for failure in result["failures"]] == ["io_error"] * 10
    for failure in result["failures"]:
        assert f"{failure['error']['path']}/".startswith(f"{failure['destination']}/")
