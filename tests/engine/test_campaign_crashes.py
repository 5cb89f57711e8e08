"""Batches whose process is killed or paused at any step: every fork is made once, none is torn, no write is late."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tasks.copier.campaign import batch_record
from tasks.copier.campaign.batch import seize_batch
from tasks.copier.errors import Code, ForkError
from tasks.copier.fork.completion import Superseded
from tasks.copier.kernel import syscalls
from tasks.copier.roots import Roots
from tasks.copier.staging.control_directory import Held, control_name
from tasks.copier.staging.gc import collect
from tasks.copier.staging.staging import Staging
from tests.fixtures.filesystems import Fresh
from tests.fixtures.processes import wait_until
from tests.support.engine.child_processes import Child, children_of_this_process, in_child
from tests.support.engine.forks import assert_alike, leftovers
from tests.support.engine.local_campaigns import (
    ID,
    Ledger,
    campaign,
    destinations,
    end,
    firsts,
    holding,
    make_batches,
    plan,
)
from tests.support.guests import MIB, SKIPPED_BY_DEFAULT, GuestSizes, make_guest
from tests.support.journals import rewrite_spec
from tests.support.system.result_checks import check_file_results, identity
from tests.support.tree import snapshot

SIZES = GuestSizes(overlay=4 * MIB, overlay_data=MIB, memory=MIB, memory_data=MIB // 2, config=64 << 10)
FORKS = 6

#: Steps of a batch: the function that is called there, and the number of earlier calls of it.
STEPS: dict[str, tuple[Any, str, int]] = {
    "before its first record": (batch_record, "write", 0),
    "before its first tree": (Staging, "make_named_tree", 0),
    "between two trees": (Staging, "make_named_tree", 3),
    "before its first file": (syscalls, "ficlone", 0),
    "between two files": (syscalls, "ficlone", 15),
    "before its second record": (batch_record, "write", 1),
    "before its first rename": (syscalls, "rename_noreplace", 0),
    "between two renames": (syscalls, "rename_noreplace", 3),
    "before its outcomes are stored": (Ledger, "store_outcomes", 0),
    "after its outcomes are stored": (batch_record, "forget", 0),
    "before its lock is removed": (Staging, "forget_chunk", 0),
}


pytestmark = pytest.mark.usefixtures("few_batches")


@pytest.fixture
def directory(fresh: Fresh) -> Path:
    return fresh("xfs")


@pytest.fixture
def source(directory: Path) -> Path:
    source = make_guest(directory / "source", SIZES)
    os.link(source / "state", source / "state.linked")
    return source


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    (tmp_path / "ledger").mkdir()
    return Ledger(tmp_path / "ledger")


def acting_at(step: str, act: Callable[[], Any], work: Callable[[], Any]) -> Child[Any]:
    """A child process that runs `work`, and calls `act` immediately before a given step."""
    owner, name, calls_before = STEPS[step]

    def run() -> Any:
        original, calls = getattr(owner, name), [0]

        def counted(*args: Any, **kwargs: Any) -> Any:
            if calls[0] == calls_before:
                act()
            calls[0] += 1
            return original(*args, **kwargs)

        setattr(owner, name, counted)
        return work()

    return Child(run)


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def pause() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def wait_until_killed(child: Child[Any]) -> None:
    with pytest.raises(AssertionError, match="the child ended with -9"):
        child.result()


def wait_for_pause(child: Child[Any]) -> None:
    wait_until(lambda: Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T", "the pause")


def assert_all_are_whole(source: Path, paths: list[Path], ledger: Ledger) -> None:
    """Each fork exists once, equals the source, and has exactly one result."""
    assert [fork["status"] for fork in ledger.forks] == ["succeeded"] * len(paths), ledger.forks
    assert [fork["destination"] for fork in ledger.forks] == [str(path) for path in paths]
    for n, path in enumerate(paths):
        assert_alike(source, path, SKIPPED_BY_DEFAULT)
        check_file_results(ledger.forks[n], ledger.files(n))


@pytest.mark.parametrize("step", list(STEPS))
def test_a_killed_batch_is_resumed(directory: Path, source: Path, ledger: Ledger, step: str) -> None:
    # Given
    paths = destinations(directory, FORKS)
    plan(source, paths)

    # When
    wait_until_killed(acting_at(step, kill_self, lambda: make_batches(paths[0], ledger)))
    published = {path: identity(path) for path in paths if path.exists()}
    for path in published:
        assert_alike(source, path, SKIPPED_BY_DEFAULT)
    make_batches(paths[0], ledger)

    # Then
    assert_all_are_whole(source, paths, ledger)
    assert {path: identity(path) for path in published} == published
    assert end(paths[0], ledger)["status"] == "succeeded"
    assert leftovers(directory) == []


@pytest.mark.parametrize("step", ["between two renames", "before its outcomes are stored"])
@pytest.mark.parametrize("change", ["gone", "replaced"])
def test_forks_published_by_a_killed_process_succeed_although_the_source_is_gone(
    directory: Path, source: Path, ledger: Ledger, step: str, change: str
) -> None:
    # Given a batch that was killed after it had published some of its forks, when all were complete
    paths = destinations(directory, FORKS)
    plan(source, paths)
    wait_until_killed(acting_at(step, kill_self, lambda: make_batches(paths[0], ledger)))
    published = [path.exists() for path in paths]
    moved = source.rename(directory / "moved")
    if change == "replaced":
        source.mkdir()

    # When
    make_batches(paths[0], ledger)

    # Then no published fork is reported as failed
    assert any(published)
    for path, fork in zip(paths, ledger.forks, strict=True):
        assert (fork["status"] == "succeeded") == path.exists()
    for path, before in zip(paths, published, strict=True):
        assert path.exists() or not before
        if path.exists():
            assert_alike(moved, path, SKIPPED_BY_DEFAULT)
    end(paths[0], ledger)
    assert leftovers(directory) == []


@pytest.mark.parametrize("step", ["before its first file", "before its first rename", "between two renames"])
def test_a_killed_batch_that_is_cancelled_keeps_only_published_forks(
    directory: Path, source: Path, ledger: Ledger, step: str
) -> None:
    paths = destinations(directory, FORKS)
    plan(source, paths)
    wait_until_killed(acting_at(step, kill_self, lambda: make_batches(paths[0], ledger)))
    published = [path for path in paths if path.exists()]

    make_batches(paths[0], ledger, abort=ForkError(Code.CANCELLED, "cancelled on request"))

    for path, fork in zip(paths, ledger.forks, strict=True):
        assert fork["status"] == ("succeeded" if path.exists() else "cancelled")
    for path in published:
        assert_alike(source, path, SKIPPED_BY_DEFAULT)
    end(paths[0], ledger)
    assert leftovers(directory) == []


def test_a_batch_that_is_killed_often_at_any_moment_makes_every_fork_once(
    directory: Path, source: Path, tmp_path: Path
) -> None:
    rng, killed = random.Random(11), 0
    (tmp_path / "whole").mkdir()
    whole, paths = Ledger(tmp_path / "whole"), destinations(directory, FORKS)
    plan(source, paths)
    began = time.monotonic()
    in_child(lambda: make_batches(paths[0], whole))
    pace = time.monotonic() - began
    end(paths[0], whole)
    turn = 0
    while killed < 8:
        assert turn < 40, f"{killed} of {3 * turn} batches lived until they were killed"
        (tmp_path / f"ledger-{turn}").mkdir()
        ledger = Ledger(tmp_path / f"ledger-{turn}")
        paths = [directory / f"t{turn}-{n}" for n in range(FORKS)]
        plan(source, paths)
        for _ in range(3):  # the fourth attempt is the last one
            child = Child(lambda: make_batches(paths[0], ledger))  # noqa: B023 - forked here and now
            if child.is_done(rng.uniform(0, pace)):
                pace *= 0.8  # the duration was measured while the machine was busier
            else:
                killed += 1
            child.kill()
        make_batches(paths[0], ledger)

        assert_all_are_whole(source, paths, ledger)
        end(paths[0], ledger)
        assert leftovers(directory) == []
        turn += 1


def test_a_tree_whose_removal_was_killed_is_removed_at_the_end(directory: Path, source: Path, ledger: Ledger) -> None:
    """A tree is renamed before it is removed; and a finished tree has the mode of the source."""
    # Given a batch that was killed when its trees were finished, and again when it had renamed one of them
    paths = destinations(directory, FORKS)
    plan(source, paths)
    wait_until_killed(acting_at("before its second record", kill_self, lambda: make_batches(paths[0], ledger)))
    STEPS["between the rename of a tree and its removal"] = (Staging, "discard_named_tree", 0)
    wait_until_killed(
        acting_at("between the rename of a tree and its removal", kill_self, lambda: make_batches(paths[0], ledger))
    )
    before = leftovers(directory)

    # When
    make_batches(paths[0], ledger)
    end(paths[0], ledger)

    # Then
    assert len(before) == 1 + FORKS
    assert_all_are_whole(source, paths, ledger)
    assert leftovers(directory) == []


def test_a_batch_that_kills_its_process_each_time_fails_as_worker_lost(
    directory: Path, source: Path, ledger: Ledger
) -> None:
    paths = destinations(directory, FORKS)
    plan(source, paths)
    for _ in range(4):
        wait_until_killed(acting_at("between two files", kill_self, lambda: make_batches(paths[0], ledger)))

    make_batches(paths[0], ledger)

    assert {fork["error"] and fork["error"]["code"] for fork in ledger.forks} == {"worker_lost"}
    result = end(paths[0], ledger)
    assert (result["status"], result["forks"]["failed"]) == ("failed", FORKS)
    assert [path.name for path in directory.iterdir()] == ["source"]


def test_a_killed_batch_of_two_parents_is_resumed_in_both(
    directory: Path, source: Path, ledger: Ledger, fresh: Fresh
) -> None:
    # Given a batch that was killed between two renames in the second parent
    elsewhere = fresh("xfs")
    paths = [*destinations(directory, 3), *destinations(elsewhere, 3)]
    plan(source, paths)
    STEPS["in the second parent"] = (syscalls, "rename_noreplace", 4)
    wait_until_killed(acting_at("in the second parent", kill_self, lambda: make_batches(paths[0], ledger)))
    assert [path.exists() for path in paths] == [True, True, True, True, False, False]
    assert leftovers(elsewhere) != []

    # When
    make_batches(paths[0], ledger)

    # Then
    assert_all_are_whole(source, paths, ledger)
    end(paths[0], ledger)
    assert leftovers(directory) == leftovers(elsewhere) == []


def test_staging_of_an_earlier_campaign_with_the_same_id_is_never_published(
    directory: Path, source: Path, ledger: Ledger, fresh: Fresh
) -> None:
    """Its trees are complete and recorded, but belong to an earlier campaign with other destinations."""
    # Given a campaign that was killed when its trees were complete in both parents
    elsewhere = fresh("xfs")
    paths = [directory / "vm-0", elsewhere / "vm-1"]
    plan(source, paths)
    STEPS["in the second parent"] = (syscalls, "rename_noreplace", 1)
    wait_until_killed(acting_at("in the second parent", kill_self, lambda: make_batches(paths[0], ledger)))

    # When another campaign uses its id, and the source has changed
    (source / "new").write_text("later")
    result = campaign(source, [directory / "vm-2", elsewhere / "vm-3"])

    # Then
    assert result["status"] == "succeeded", result
    for path in (directory / "vm-2", elsewhere / "vm-3"):
        assert_alike(source, path, SKIPPED_BY_DEFAULT)
    assert not (elsewhere / "vm-1").exists()
    assert leftovers(directory) == leftovers(elsewhere) == []


@pytest.fixture
def paused_child(
    directory: Path, source: Path, ledger: Ledger, request: pytest.FixtureRequest
) -> Iterator[tuple[Child[Any], list[Path]]]:
    """A child that is stopped in the middle of a batch, at the step that the test names; and the destinations."""
    paths = destinations(directory, FORKS)
    plan(source, paths)

    def work() -> str:
        try:
            make_batches(paths[0], ledger)
        except Superseded:
            return "superseded"
        return "done"

    child = acting_at(request.param, pause, work)
    wait_for_pause(child)
    yield child, paths
    with suppress(ChildProcessError):  # it has ended, unless the test failed
        if os.waitpid(child.pid, os.WNOHANG)[0] == 0:
            child.kill()


def seize(home: Path) -> None:
    with holding(home) as found:
        for first in firsts(found):
            seize_batch(found, Roots(), first)


@pytest.mark.parametrize("paused_child", list(STEPS)[:-2], indirect=True)
def test_a_paused_process_that_lost_its_batch_writes_nothing_into_published_forks(
    source: Path, ledger: Ledger, paused_child: tuple[Child[Any], list[Path]], directory: Path
) -> None:
    # Given a batch that was taken over from a paused process, and made
    child, paths = paused_child
    with pytest.raises(Held):
        make_batches(paths[0], ledger)
    seize(paths[0])
    make_batches(paths[0], ledger)
    assert_all_are_whole(source, paths, ledger)
    published, outcomes = {path: (identity(path), snapshot(path)) for path in paths}, ledger.outcomes

    # When
    os.kill(child.pid, signal.SIGCONT)

    # Then
    assert child.result() in ("superseded", "done")
    assert {path: (identity(path), snapshot(path)) for path in paths} == published
    assert ledger.outcomes == outcomes
    end(paths[0], ledger)
    assert leftovers(directory) == []


@pytest.mark.parametrize("paused_child", list(STEPS)[:-2], indirect=True)
def test_a_paused_process_that_lost_its_batch_publishes_no_fork_that_was_given_up(
    ledger: Ledger, paused_child: tuple[Child[Any], list[Path]], directory: Path
) -> None:
    child, paths = paused_child
    seize(paths[0])
    make_batches(paths[0], ledger, abort=ForkError(Code.CANCELLED, "cancelled on request"))
    reported = [fork["status"] == "succeeded" for fork in ledger.forks]

    os.kill(child.pid, signal.SIGCONT)

    child.result()
    assert [path.exists() for path in paths] == reported
    end(paths[0], ledger)
    assert leftovers(directory) == []


@pytest.mark.parametrize("paused_child", ["between two files", "before its first rename"], indirect=True)
def test_a_paused_process_that_resumes_after_the_campaign_leaves_nothing(
    source: Path, ledger: Ledger, paused_child: tuple[Child[Any], list[Path]], directory: Path
) -> None:
    child, paths = paused_child
    seize(paths[0])
    make_batches(paths[0], ledger)
    end(paths[0], ledger)

    os.kill(child.pid, signal.SIGCONT)

    child.result()
    assert leftovers(directory) == []
    assert_all_are_whole(source, paths, ledger)


def test_gc_keeps_a_running_campaign_and_removes_a_killed_one_with_all_its_trees(
    directory: Path, source: Path, ledger: Ledger, fresh: Fresh
) -> None:
    # Given a local campaign in two parents
    elsewhere = fresh("ext4")
    paths = [*destinations(directory, 3), *destinations(elsewhere, 3)]
    plan(source, paths)
    STEPS["in the second parent"] = (syscalls, "rename_noreplace", 3)
    child = acting_at("in the second parent", pause, lambda: make_batches(paths[0], ledger))
    wait_for_pause(child)
    existing = leftovers(directory), leftovers(elsewhere)
    assert len(existing[1]) > 3

    # When it runs, when it is paused, and when it is killed
    live = [finding for parent in (directory, elsewhere) for finding in collect(str(parent), lambda job: True)]
    assert (leftovers(directory), leftovers(elsewhere)) == existing
    child.kill()
    dead = [finding for parent in (directory, elsewhere) for finding in collect(str(parent), lambda job: True)]

    # Then
    assert {finding.verdict for finding in live} == {"kept"}
    assert {(finding.verdict, finding.fork_id) for finding in dead} == {("removed", ID)}
    assert leftovers(directory) == leftovers(elsewhere) == []
    assert [path.exists() for path in paths] == [True, True, True, False, False, False]


def test_gc_in_a_loop_does_not_affect_a_running_campaign(directory: Path, source: Path) -> None:
    def reap() -> None:
        while True:
            list(collect(str(directory), lambda job: False))

    reaper = Child(reap)
    try:
        result = campaign(source, destinations(directory, 300))
    finally:
        reaper.kill()

    assert result["status"] == "succeeded", result["error"] or result["failures"][:3]
    assert_alike(source, directory / "vm-299", SKIPPED_BY_DEFAULT)


def test_gc_keeps_staging_of_jobs_that_the_queue_will_deliver_again(directory: Path, source: Path) -> None:
    plan(source, destinations(directory, 3))
    rewrite_spec(directory / control_name(ID) / "journal", owner="queue")

    kept = list(collect(str(directory), lambda job: True))
    unknown = list(collect(str(directory), lambda job: None))
    removed = list(collect(str(directory), lambda job: False))

    assert [finding.verdict for finding in (*kept, *unknown, *removed)] == ["kept", "kept", "removed"]


def test_killed_children_only_delay_a_local_campaign(directory: Path, source: Path) -> None:
    killed: list[int] = []
    others = children_of_this_process()

    def kill_one(progress: object) -> None:
        children = [pid for pid in children_of_this_process() if pid not in others]
        if len(killed) < 2 and children and any(directory.glob(f"vm-*{len(killed)}9")):
            killed.append(children[0])
            os.kill(killed[-1], signal.SIGKILL)

    paths = destinations(directory, 2000)  # enough polls on any machine: the callback kills the children
    result = campaign(source, paths, poll=kill_one)

    assert killed
    assert (result["status"], result["forks"]["succeeded"]) == ("succeeded", 2000)
    for path in paths[::100]:
        assert_alike(source, path, SKIPPED_BY_DEFAULT)
    assert leftovers(directory) == []


def test_a_killed_local_campaign_can_be_repeated_under_its_id(directory: Path, source: Path) -> None:
    # Given
    paths = destinations(directory, 1000)
    child = Child(lambda: campaign(source, paths))
    wait_until(paths[5].exists, "a few forks")
    child.kill()
    existing = {path: identity(path) for path in paths if path.exists()}

    # When
    deadline = time.monotonic() + 10
    while True:
        result = campaign(source, paths)
        error = result["error"]
        if error is None or "another process" not in error["message"] or time.monotonic() > deadline:
            break  # its children end shortly after it

    # Then the published forks stay, and the rest is made
    assert result["status"] == "partial"
    assert {failure["error"]["code"] for failure in result["failures"]} == {"destination_exists"}
    assert all(path.exists() for path in paths)
    assert {path: identity(path) for path in existing} == existing
    assert leftovers(directory) == []
