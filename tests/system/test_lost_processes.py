"""Processes that are killed or shut down at any time: what was accepted is finished by other processes."""

from __future__ import annotations

import signal
from pathlib import Path

from tasks.copier.fork.chunk import MAX_TRIES
from tests.fixtures.filesystems import Fresh
from tests.support.guests import make_guest
from tests.support.processor import wait_until_asleep
from tests.support.system.result_checks import check_file_results
from tests.support.system.scheduler import Scheduler
from tests.support.system.staging_view import StagingView
from tests.support.system.systems import System, send, spin_until
from tests.support.tree import snapshot


def test_children_killed_repeatedly_at_any_moment_only_delay_a_fork(
    system: System, scheduler: Scheduler, large_source: Path, workdir: Path, fresh: Fresh
) -> None:
    directory = fresh("xfs")
    make_guest(directory / "a")
    large = scheduler.send({"source": str(large_source), "destination": str(workdir / "b")}, "killed-often")
    small = {
        n: scheduler.send({"source": str(directory / "a"), "destination": str(directory / f"b-{n}")}) for n in range(5)
    }
    staging = StagingView(workdir, "killed-often")
    for n in range(MAX_TRIES - 1):  # one more, and the fork would be given up if all were killed in the same chunk
        spin_until(lambda n=n: len(staging.done()) >= 20 * n and staging.journal(), "a fork that continues")  # type: ignore[misc]
        send(system.worker.children[:1], signal.SIGKILL)

    result = scheduler.wait(large)
    assert result["status"] == "succeeded"
    check_file_results(result, scheduler.files("killed-often"))
    assert snapshot(workdir / "b") == snapshot(large_source)
    for n, sent in small.items():
        assert scheduler.wait(sent)["destination"] == str(directory / f"b-{n}")
    system.assert_left_nothing_in(workdir, directory)


def test_fork_of_a_stopped_child_is_published_only_after_it_continues_and_is_complete(
    system: System, scheduler: Scheduler, large_source: Path, workdir: Path
) -> None:
    """While it is stopped it holds its chunk, and may write as soon as it continues."""
    # Given a child that was stopped in the middle of a chunk
    sent = scheduler.send({"source": str(large_source), "destination": str(workdir / "b")}, "stopped")
    staging = StagingView(workdir, "stopped")
    chunk, stopped_child = spin_until(lambda: _stop_one(staging), "a child in the middle of a chunk")
    try:
        # When everything else is done
        spin_until(lambda: len(staging.done()) == staging.chunks - 1, "all other chunks")
        others = [pid for pid in system.worker.children if pid != stopped_child]
        wait_until_asleep(lambda: others, "the other child to be idle")

        # Then
        assert not (workdir / "b").exists()
        assert chunk not in staging.done()
        assert not sent.ready()
    finally:
        send([stopped_child], signal.SIGCONT)
    result = scheduler.wait(sent)
    check_file_results(result, scheduler.files("stopped"))
    assert snapshot(workdir / "b") == snapshot(large_source)
    system.assert_left_nothing_in(workdir)


def _stop_one(staging: StagingView) -> tuple[int, int] | None:
    """Stop a child while it holds a chunk that is not done, after the fork was planned. Returns (chunk, pid)."""
    if staging.phase != "cloning":
        return None
    for chunk in staging.begun() - staging.done():
        pid = staging.worker_of(chunk)
        if pid is not None:
            send([pid], signal.SIGSTOP)
            if chunk not in staging.done() and staging.worker_of(chunk) == pid:
                return chunk, pid
            send([pid], signal.SIGCONT)
    return None
