"""The worker's clock is set back and forward by an hour: nothing hangs, nothing is done twice."""

from __future__ import annotations

import os
import re
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.fixtures.filesystems import Fresh
from tests.fixtures.processes import StartWorker, Worker, wait_until
from tests.support.engine.forks import assert_alike
from tests.support.guests import MIB, SKIPPED_BY_DEFAULT, GuestSizes, make_guest
from tests.support.requirements import require
from tests.support.system.queued_campaigns import (
    assert_results_are_consistent,
    done,
    make_source,
    paths_of,
    request_of,
    result_of,
    send,
)
from tests.support.system.scheduler import Scheduler
from tests.support.system.systems import SMALL_LIMITS, stopped_when

#: libfaketime 0.9.10 returns EINVAL for Python's sleep (clock_nanosleep to a time of a clock that it does not fake).
_SLEEP = """
import select, time
time.sleep = lambda seconds: select.select([], [], [], seconds)
"""
_LIBRARIES = ("/usr/lib/x86_64-linux-gnu/faketime", "/usr/lib/aarch64-linux-gnu/faketime", "/usr/lib/faketime")


class Clock:
    """The time as the worker sees it, as an offset from the real time."""

    def __init__(self, file: Path) -> None:
        library = next((Path(path) / "libfaketimeMT.so.1" for path in _LIBRARIES if Path(path).is_dir()), None)
        require(library is not None and library.exists(), "libfaketime (package faketime)", "setting the clock")
        self._file = file
        self.set("+0")
        site = file.with_name("site")
        site.mkdir()
        (site / "sitecustomize.py").write_text(_SLEEP)
        self.environment = {
            "LD_PRELOAD": str(library),
            "FAKETIME_TIMESTAMP_FILE": str(file),
            "FAKETIME_CACHE_DURATION": "1",  # seconds
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",  # the kernel's own clock does not jump either
            "NO_FAKE_STAT": "1",
            "PYTHONPATH": os.fspath(site),
        }

    def set(self, offset: str) -> None:
        new = self._file.with_suffix(".new")
        new.write_text(offset)
        os.rename(new, self._file)


def test_forks_succeed_once_while_the_clock_jumps(
    own_scheduler: Scheduler,
    start_worker: StartWorker,
    mounts: Path,
    fresh: Fresh,
    tmp_path: Path,
) -> None:
    # Given a worker whose leases and queues store times
    clock = Clock(tmp_path / "clock")
    directory = fresh("ext4")
    source = make_guest(directory / "source", GuestSizes(overlay=8 * MIB, overlay_data=5 * MIB, memory=MIB))
    worker = start_worker(mounts, 2, env=SMALL_LIMITS | clock.environment)
    request = {"source": str(source), "reflink": "never"}
    sent = []

    for offset, hours in (("-1h", -1), ("+1h", 1), ("+0", 0)):
        expected = (datetime.now(UTC) + timedelta(hours=hours)).strftime("%Y-%m-%d %H")
        # When the clock jumps while a fork runs, and more forks follow
        for n in range(2):
            sent.append(own_scheduler.send({**request, "destination": str(directory / f"{offset}-{n}")}))
        wait_until(lambda: any(directory.glob(".forkvm-*")), "a fork that runs")
        clock.set(offset)
        while _hour(worker) != expected:
            destination = directory / f"{offset}-{len(sent)}"
            sent.append(own_scheduler.send({**request, "destination": str(destination)}))
            own_scheduler.wait(sent[-1])
        results = [own_scheduler.wait(one) for one in sent]

    # Then
    own_scheduler.wait_quiet()
    for result in results:
        assert result["status"] == "succeeded"
        assert min(result["seconds"].values()) >= 0
        assert_alike(source, Path(result["destination"]), SKIPPED_BY_DEFAULT)
    assert worker.output().count(" succeeded: ") == len(sent)
    assert list(directory.glob(".forkvm-*")) == []


@pytest.mark.parametrize(("offset", "deadline", "status"), [("+1h", 300, "succeeded"), ("-1h", 8, "cancelled")])
def test_deadline_of_a_campaign_uses_one_clock(
    offset: str,
    deadline: float,
    status: str,
    own_scheduler: Scheduler,
    start_worker: StartWorker,
    mounts: Path,
    fresh: Fresh,
    tmp_path: Path,
) -> None:
    """The host that makes forks may have another clock than the host that planned them."""
    # Given a campaign that is half done
    clock, workdir = Clock(tmp_path / "clock"), fresh("xfs")
    source = make_source(workdir / "source")
    worker = start_worker(mounts, 2, env=clock.environment)
    sent = time.monotonic()
    send(own_scheduler, request_of(source, workdir, 600, deadline=deadline), "c")
    with stopped_when(worker, lambda: 0 < done(own_scheduler, "c") < 600, "a half-done campaign"):
        # When the clock of the worker that makes the rest differs by an hour, and a short deadline passes
        clock.set(offset)
        if status == "cancelled":
            wait_until(lambda: time.monotonic() > sent + deadline + 1, "the deadline")

    # Then
    wait_until(lambda: own_scheduler.results.final.get("c") is not None, "the end", 60)
    own_scheduler.wait_quiet()
    assert result_of(own_scheduler, "c")["status"] == status
    assert_results_are_consistent(own_scheduler, result_of(own_scheduler, "c"), paths_of(workdir, 600))


@pytest.mark.parametrize("offset", ["+2h", "-2h"])
def test_the_last_heartbeat_of_a_killed_worker_does_not_depend_on_its_clock(
    offset: str, own_scheduler: Scheduler, start_worker: StartWorker, tmp_path: Path
) -> None:
    clock = Clock(tmp_path / "clock")
    clock.set(offset)

    start_worker(tmp_path, 1, env=clock.environment).kill()

    (seen,) = own_scheduler.results.workers.seen().values()
    assert 0 <= seen.age < 60


def _hour(worker: Worker) -> str:
    """The hour of the worker's clock, from the last line of its log."""
    return str(re.findall(r"^\[(\S+ \d\d):", worker.output(), re.MULTILINE)[-1])
