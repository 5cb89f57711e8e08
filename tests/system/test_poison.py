"""Work that kills its process each time: it ends as worker_lost after a bounded number of tries, and nothing else does.

A worker notices a dead child within five seconds, so all poisons are taken at once, and each test looks at one.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery.result import AsyncResult

from tasks.copier.chunk import MAX_TRIES
from tasks.copier.report import FileResult
from tasks.copier.spec import ForkResult
from tests.fixtures.filesystems import fresh_directory
from tests.fixtures.processes import Worker
from tests.fixtures.redis_server import RedisServer
from tests.support.guests import MIB, make_guest, make_sparse_file
from tests.system.books import check_books, check_fork_result
from tests.system.running import System, send, spin_until
from tests.system.scheduler import Scheduler
from tests.system.staging import StagingView, leftovers

#: Chunks long enough that their worker is seen before they are done.
LIMITS = {
    "FORKVM_INLINE_FILES": "50",
    "FORKVM_INLINE_BYTES": str(4 * MIB),
    "FORKVM_CHUNK_FILES": "100",
    "FORKVM_CHUNK_BYTES": str(64 * MIB),
}
#: More kills than tries: work without a bound of its own is done when its killer has had enough.
MOST_KILLS = 2 * MAX_TRIES
#: Seconds for all of them to end.
PATIENCE = 100.0


@dataclass
class Outcome:
    """What became of one poisoned fork."""

    source: Path
    destination: Path
    kills: int
    message: str
    result: ForkResult | None
    files: list[FileResult]


@dataclass
class Outcomes:
    """What became of all, and of the good forks beside them."""

    poisoned: dict[str, Outcome]
    good: list[str]
    leftovers: list[str]


class Poison:
    """Kills the process that does a certain part of one fork, each time anew."""

    def __init__(self, source: Path, parent: Path, fork_id: str) -> None:
        self.source, self.destination = source, parent / fork_id
        self.staging = StagingView(parent, fork_id)
        self.kills = 0
        self._attempts: set[str] = set()

    def kill_planner(self) -> int | None:
        """Each attempt once, when it has begun to make its tree: giving up afterwards is no part of the poison."""
        journal = self.staging.journal()
        attempt = str(journal.get("attempt"))
        tree = self.staging.control.with_name(f"{self.staging.control.name}.{attempt}")
        if journal.get("phase") != "planning" or attempt in self._attempts or not tree.exists():
            return None
        self._attempts.add(attempt)
        return self.staging.owner()

    def kill_chunk(self) -> int | None:
        """Whoever works on chunk 1, but not who only writes down that it was begun too often."""
        return self.staging.worker_of(1) if 0 < self.staging.tries(1) <= MAX_TRIES else None


@contextmanager
def _at_work(poison: Poison, find: Callable[[], int | None]) -> Iterator[None]:
    end = threading.Event()
    killed: set[int] = set()

    def kill() -> None:
        while not end.is_set():
            pid = find()
            if pid is not None and pid not in killed and poison.kills < MOST_KILLS:
                send([pid], signal.SIGKILL)
                killed.add(pid)
                poison.kills += 1
            time.sleep(0.001)

    thread = threading.Thread(target=kill, name="poison", daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


def _make_source_with_long_plan(source: Path) -> None:
    for n in range(60):
        layer = source / str(n)
        layer.mkdir(parents=True)
        for m in range(100):
            (layer / str(m)).mkdir()


def _make_source_with_long_chunks(source: Path) -> None:
    source.mkdir()
    make_sparse_file(source / "disk.raw", 256 * MIB, 256 * MIB)


@pytest.fixture(scope="module")
def outcomes(module_worker: tuple[RedisServer, Worker], xfs_noreflink: Path) -> Iterator[Outcomes]:
    server, _ = module_worker
    app = Celery("scheduler", broker=server.broker_url, backend=server.backend_url, set_as_current=False)
    scheduler = Scheduler(app, server)
    with ExitStack() as stack:
        stack.callback(app.close)
        stack.callback(scheduler.close)
        parent = stack.enter_context(fresh_directory(xfs_noreflink))
        poisons: dict[str, Poison] = {}
        for name, make in (
            ("plan", _make_source_with_long_plan),
            ("chunk", _make_source_with_long_chunks),
        ):
            make(parent / f"{name}-source")
            poisons[name] = Poison(parent / f"{name}-source", parent, name)
        make_guest(parent / "good-source")
        with (
            _at_work(poisons["plan"], poisons["plan"].kill_planner),
            _at_work(poisons["chunk"], poisons["chunk"].kill_chunk),
        ):
            sent: dict[str, AsyncResult[Any]] = {}
            for name, poison in poisons.items():
                request = {"source": str(poison.source), "destination": str(poison.destination), "verify": "content"}
                sent[name] = scheduler.send(request, name)
            good: list[str] = [scheduler.fork(parent / "good-source", parent / f"good-{n}")["status"] for n in range(4)]
            spin_until(lambda: all(one.ready() for one in sent.values()), "the end of all", PATIENCE)
        scheduler.wait_quiet()
        good.append(scheduler.fork(parent / "good-source", parent / "good-next")["status"])
        yield Outcomes(
            poisoned={
                name: Outcome(
                    source=poison.source,
                    destination=poison.destination,
                    kills=poison.kills,
                    message=str(sent[name].result),
                    result=scheduler.results.result(name),
                    files=scheduler.files(name),
                )
                for name, poison in poisons.items()
            },
            good=good,
            leftovers=leftovers(parent),
        )


@pytest.mark.parametrize("part", ["plan", "chunk"])
def test_work_that_kills_its_process_each_time_ends_as_worker_lost(
    system: System, outcomes: Outcomes, part: str
) -> None:
    outcome = outcomes.poisoned[part]

    assert outcome.kills > 1
    assert outcome.message.startswith(f"worker_lost: {outcome.source}: ")
    assert outcome.result is not None
    check_fork_result(outcome.result)
    check_books(outcome.result, outcome.files)
    assert (outcome.result["status"], outcome.result["chunks"] > 0) == ("failed", part != "plan")
    assert not os.path.lexists(outcome.destination)


def test_other_forks_are_made_beside_and_after_them(system: System, outcomes: Outcomes) -> None:
    assert outcomes.good == ["succeeded"] * 5


def test_nothing_of_them_is_left(system: System, outcomes: Outcomes) -> None:
    assert outcomes.leftovers == []
