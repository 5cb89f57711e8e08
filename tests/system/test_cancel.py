"""Cancellation: a fork that is not published yet ends as cancelled within seconds, and leaves nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fixtures.filesystems import Fresh
from tests.support.guests import make_guest
from tests.support.processor import LoadFreeStopwatch
from tests.support.system.messages import Recorder, deliver
from tests.support.system.result_checks import check_file_results, check_fork_result, identity
from tests.support.system.scheduler import Scheduler, states
from tests.support.system.staging_view import StagingView
from tests.support.system.systems import System, spin_until, stopped_in_the_middle
from tests.system.conftest import LARGE_FILES

#: Seconds within which a cancelled fork must have ended after the request.
END_SECONDS = 2.0


def _assert_cancelled(scheduler: Scheduler, fork_id: str, destination: Path) -> None:
    message, result = scheduler.wait_failed(scheduler.app.AsyncResult(fork_id), timeout=10)
    check_fork_result(result)
    assert scheduler.results.states.get(fork_id)["status"] == "REVOKED"
    assert message.startswith("cancelled: ")
    assert (result["status"], result["destination"]) == ("cancelled", str(destination))
    assert result["error"] is not None
    assert result["error"]["code"] == "cancelled"
    check_file_results(result, scheduler.files(fork_id))
    assert not destination.exists()


@pytest.mark.parametrize("step", ["planning", "first chunk", "half done"])
def test_cancellation_ends_a_large_fork_within_seconds_and_leaves_nothing(
    system: System, scheduler: Scheduler, large_source: Path, workdir: Path, step: str
) -> None:
    # Given
    fork_id = f"cancel-{step}"
    request = {"source": str(large_source), "destination": str(workdir / "b")}
    staging = StagingView(workdir, fork_id)
    with scheduler.watching(fork_id) as records:
        sent = scheduler.send(request, fork_id)
        reached = {
            "planning": lambda: staging.phase == "planning",
            "first chunk": lambda: bool(staging.begun()),
            "half done": staging.is_in_the_middle,
        }[step]
        spin_until(lambda: reached(), step)

        # When
        scheduler.results.cancellations.request(fork_id)
        stopwatch = LoadFreeStopwatch(system.pids)

        # Then
        _assert_cancelled(scheduler, fork_id, workdir / "b")
        took = stopwatch.seconds()
        system.assert_left_nothing_in(workdir)
    assert str(sent.state) == "REVOKED"
    assert states(records)[-1] == "REVOKED"
    assert took < END_SECONDS
    # the fork was not nearly complete anyway
    result = scheduler.results.final.fork(fork_id)
    assert result is not None
    assert result["bytes"]["copied"] < sum(path.stat().st_blocks * 512 for path in large_source.rglob("*"))


def test_cancellation_ends_a_fork_of_short_chunks_without_waiting_for_all_of_them(
    system: System, scheduler: Scheduler, large_source: Path, workdir: Path
) -> None:
    """Each chunk takes less time than the poll interval: cancellation must also be checked when a chunk starts."""
    sent = scheduler.send({"source": str(large_source), "destination": str(workdir / "b")}, "cancel-short")
    staging = StagingView(workdir, "cancel-short")
    with stopped_in_the_middle(system.worker, staging):
        scheduler.results.cancellations.request("cancel-short")
        chunks, done = staging.chunks, len(staging.done())

    _assert_cancelled(scheduler, str(sent.id), workdir / "b")

    assert done < chunks // 2
    system.assert_left_nothing_in(workdir)
    done_in_all = system.worker.output().count("[cancel-short.chunk.")
    result = scheduler.results.final.fork("cancel-short")
    assert done_in_all > 0
    assert result is not None
    assert result["files"]["total"] < LARGE_FILES // 2


def test_cancellation_ends_a_fork_that_is_cloned_inline(system: System, scheduler: Scheduler, fresh: Fresh) -> None:
    """One task plans and clones; it checks for cancellation in its own poll callback."""
    directory = fresh("xfs_noreflink")
    source = directory / "a"
    source.mkdir()
    for n in range(60):
        layer = source / f"layer-{n}"
        layer.mkdir()
        for m in range(100):
            (layer / str(m)).symlink_to("nowhere")
    sent = scheduler.send({"source": str(source), "destination": str(directory / "b")}, "cancel-inline")
    spin_until(lambda: StagingView(directory, "cancel-inline").journal(), "the staging")

    scheduler.results.cancellations.request("cancel-inline")

    _assert_cancelled(scheduler, str(sent.id), directory / "b")
    system.assert_left_nothing_in(directory)


def test_fork_cancelled_before_a_worker_takes_it_is_never_started(
    system: System, scheduler: Scheduler, fresh: Fresh
) -> None:
    directory = fresh("xfs")
    make_guest(directory / "a")
    before = identity(directory)
    scheduler.results.cancellations.request("cancel-early")

    scheduler.send({"source": str(directory / "a"), "destination": str(directory / "b")}, "cancel-early")

    _assert_cancelled(scheduler, "cancel-early", directory / "b")
    system.assert_left_nothing_in(directory)
    assert identity(directory).keys() == before.keys()


def test_cancelling_after_success_changes_nothing(system: System, scheduler: Scheduler, fresh: Fresh) -> None:
    directory = fresh("xfs")
    make_guest(directory / "a")
    with Recorder(system.server) as recorder:
        result = scheduler.fork(directory / "a", directory / "b", "cancel-late")
    published = identity(directory / "b")

    scheduler.results.cancellations.request("cancel-late")
    deliver(system.server, *recorder.messages)
    scheduler.wait_quiet()

    assert scheduler.results.final.fork("cancel-late") == result
    assert scheduler.app.AsyncResult("cancel-late").get(timeout=5) == result
    assert identity(directory / "b") == published
    system.assert_left_nothing_in(directory)


def test_cancelled_fork_stays_cancelled_when_its_messages_are_redelivered(
    system: System, scheduler: Scheduler, large_source: Path, workdir: Path
) -> None:
    with Recorder(system.server) as recorder:
        sent = scheduler.send({"source": str(large_source), "destination": str(workdir / "b")}, "cancel-again")
        spin_until(lambda: StagingView(workdir, "cancel-again").begun(), "the first chunk")
        scheduler.results.cancellations.request("cancel-again")
        _assert_cancelled(scheduler, str(sent.id), workdir / "b")
        scheduler.wait_quiet()
    first = scheduler.results.final.fork("cancel-again")

    deliver(system.server, *recorder.messages)
    scheduler.wait_quiet()

    assert scheduler.results.final.fork("cancel-again") == first
    _assert_cancelled(scheduler, "cancel-again", workdir / "b")
    system.assert_left_nothing_in(workdir)


def test_other_forks_continue_when_one_is_cancelled(
    system: System, scheduler: Scheduler, large_source: Path, workdir: Path
) -> None:
    sent = {
        name: scheduler.send({"source": str(large_source), "destination": str(workdir / name)}, name) for name in "xy"
    }
    spin_until(lambda: StagingView(workdir, "x").begun(), "the first chunk")

    scheduler.results.cancellations.request("x")

    _assert_cancelled(scheduler, "x", workdir / "x")
    result = scheduler.wait(sent["y"])
    assert result["status"] == "succeeded"
    check_file_results(result, scheduler.files("y"))
    system.assert_left_nothing_in(workdir)
