"""A thousand small forks compared with a thousand Celery tasks that do nothing, on the same worker."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from benchmarks.cases import MINI
from benchmarks.contenders.service import EMPTY_TASK, Message, Service
from benchmarks.filesystems import Filesystem
from benchmarks.log import log
from benchmarks.report.tables import Finding
from benchmarks.rounds import built, remove, sync
from tasks.names import FORK_TASK

CASES = (MINI,)

_EMPTY = Message(EMPTY_TASK, {})
_MESSAGES = 1_000
_ROUNDS = 7
_MOST_RATIO = 2.5


def measure_small_forks(filesystem: Filesystem, service: Service) -> Iterator[Finding]:
    """Seconds from the first message to the last result, for empty tasks and forks in turn."""
    empty: list[float] = []
    forks: list[float] = []
    with built(MINI, filesystem) as source:
        for number in range(_ROUNDS):
            log(f"singles: {filesystem.name}, round {number + 1} of {_ROUNDS}")
            service.forget_results()
            empty.append(service.run_all([_EMPTY] * _MESSAGES))
            fan = filesystem.path / "fan"
            fan.mkdir()
            sync(filesystem)
            requests = [{"source": str(source), "destination": str(fan / f"vm-{n:04}")} for n in range(_MESSAGES)]
            service.forget_results()
            forks.append(service.run_all([Message(FORK_TASK, {"request": request}) for request in requests]))
            remove(fan)
    where = f"{filesystem.name}, {_MESSAGES:,} messages"
    yield Finding(f"{where}: empty Celery tasks", median(empty), "s")
    yield Finding(f"{where}: single forks of {MINI.name}", median(forks), "s")
    yield Finding(f"{where}: the forks by the empty tasks", median(forks) / median(empty), "times", _MOST_RATIO)
