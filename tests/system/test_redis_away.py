"""Redis stops and starts again: every fork ends with its true result, and the worker consumes again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fixtures.filesystems import Fresh, fresh_directory
from tests.fixtures.processes import wait_until
from tests.support.guests import MIB, make_guest, make_sparse_file
from tests.support.system.result_checks import check_file_results, check_fork_result
from tests.support.system.scheduler import UNACKED, Scheduler
from tests.support.system.staging_view import StagingView, leftovers
from tests.support.system.systems import StartSystem, System, spin_until
from tests.support.tree import snapshot

#: Log lines of the main process after 0, 2, 4 seconds and so on, and of a child with a task twice a second. The main
#: process does not notice an outage while it waits for no message, since its children have all that it may take.
_OUTAGE_LINES = ("Cannot connect to redis", "Redis does not answer; trying again")


def _is_finishing(staging: StagingView) -> bool:
    return staging.phase == "cloning" and len(staging.done()) == staging.chunks and staging.owner() is not None


STEPS: dict[str, Callable[[StagingView], bool]] = {
    "while it is planned": lambda staging: staging.phase == "planning",
    "while it is finished": _is_finishing,
}


@pytest.fixture(scope="module")
def source(xfs_noreflink: Path) -> Iterator[Path]:
    """A source for which every step takes a while: the plan, the chunks, the finish."""
    with fresh_directory(xfs_noreflink) as source:
        make_sparse_file(source / "disk.raw", 128 * MIB, 64 * MIB)
        for n in range(3000):
            (source / "directories" / str(n)).mkdir(parents=True)
            (source / "directories" / str(n) / "block").write_bytes(b"%d" % n)
        yield source


def _stop_redis(system: System, times: int, *, kill: bool = False) -> None:
    """Stop Redis until the worker's processes have logged so many failed attempts."""

    def missed() -> int:
        return sum(map(system.worker.output().count, _OUTAGE_LINES))

    before = missed()
    if kill:
        system.server.kill()
    else:
        system.server.stop()
    wait_until(lambda: missed() >= before + times, "the worker to notice the outage")
    system.server.start()


def _forget_unacknowledged(scheduler: Scheduler) -> None:
    """Ignore messages that an outage leaves unacknowledged; another test checks them."""
    scheduler.redis.delete(UNACKED, f"{UNACKED}_index", f"{UNACKED}_mutex")


@pytest.mark.parametrize(
    ("step", "kill", "times"),
    [
        pytest.param("while it is planned", True, 1, id="while it is planned"),
        pytest.param("while it is finished", False, 4, id="while it is finished"),
    ],
)
def test_fork_ends_with_its_true_result_after_redis_was_down_and_the_next_one_is_served(
    start_system: StartSystem, source: Path, workdir: Path, fresh: Fresh, step: str, kill: bool, times: int
) -> None:
    # Given a large fork at a certain step, and small ones in the queue behind it
    system = start_system()
    scheduler = system.scheduler
    directory = fresh("xfs")
    make_guest(directory / "a")
    scheduler.send({"source": str(source), "destination": str(workdir / "b")}, "away")
    for n in range(4):
        scheduler.send({"source": str(directory / "a"), "destination": str(directory / f"b-{n}")}, f"small-{n}")
    staging = StagingView(workdir, "away")
    spin_until(lambda: STEPS[step](staging), step)

    # When
    _stop_redis(system, times, kill=kill)

    # Then all of them succeed. The test reads Redis directly: Celery's own wait does not survive a restart of the
    # server
    for fork_id in ("away", "small-0", "small-1", "small-2", "small-3"):
        _wait_for_success(scheduler, fork_id)
    assert snapshot(workdir / "b") == snapshot(source)
    guest = snapshot(directory / "a")
    for n in range(4):
        assert snapshot(directory / f"b-{n}")[b"overlay.raw"] == guest[b"overlay.raw"]
    wait_until(lambda: not leftovers(workdir) and not leftovers(directory), "the removal of all staging")

    # and the worker consumes again
    assert system.worker.running, "the worker ended"
    scheduler.send({"source": str(directory / "a"), "destination": str(directory / "next")}, "next")
    _wait_for_success(scheduler, "next")
    _forget_unacknowledged(scheduler)


def _wait_for_success(scheduler: Scheduler, fork_id: str) -> None:
    wait_until(lambda: scheduler.results.final.fork(fork_id) is not None, f"the result of {fork_id}")
    result = scheduler.results.final.fork(fork_id)
    assert result is not None
    check_fork_result(result)
    assert (result["status"], result["error"]) == ("succeeded", None)
    wait_until(lambda: scheduler.results.states.get(fork_id)["status"] == "SUCCESS", f"the state of {fork_id}")
    assert scheduler.results.states.get(fork_id)["result"] == result
    check_file_results(result, scheduler.files(fork_id))


def _has_progressed(staging: StagingView, part: float) -> bool:
    """Whether at least this share of a fork's chunks is done, or the fork has ended."""
    chunks = staging.chunks
    return (chunks > 0 and len(staging.done()) >= part * chunks) or not staging.control.exists()


def test_no_fork_is_lost_and_nothing_stays_unacknowledged_over_several_outages(
    start_system: StartSystem, source: Path, large_source: Path, workdir: Path
) -> None:
    """Each outage starts at another moment: a message may be in transit, or taken and not yet recorded."""
    system = start_system()
    scheduler = system.scheduler
    for name, directory in (("x", source), ("y", large_source)):
        scheduler.send({"source": str(directory), "destination": str(workdir / name)}, name)
    spin_until(lambda: all(StagingView(workdir, name).journal() for name in ("x", "y")), "both to be running")

    large = StagingView(workdir, "y")
    for n in range(4):
        spin_until(lambda n=n: n == 0 or _has_progressed(large, n / 5), "progress", 60)  # type: ignore[misc]
        _stop_redis(system, 1, kill=bool(n % 2))

    for name in ("x", "y"):
        _wait_for_success(scheduler, name)
    assert system.worker.running, "the worker ended"
    wait_until(lambda: not any(scheduler.messages().values()), "the end of all messages")
    assert leftovers(workdir) == []


def test_idle_worker_consumes_again_after_redis_was_down(start_system: StartSystem, fresh: Fresh) -> None:
    system = start_system()
    directory = fresh("xfs")
    make_guest(directory / "a")

    _stop_redis(system, 1)

    system.scheduler.send({"source": str(directory / "a"), "destination": str(directory / "b")}, "after")
    _wait_for_success(system.scheduler, "after")
    assert system.worker.running
    system.assert_left_nothing_in(directory)
