"""The largest resident memory of any process during a fork."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

from benchmarks.cases import BIG, Case, small_files
from benchmarks.contenders.programs import engine
from benchmarks.contenders.service import Service
from benchmarks.filesystems import Filesystem
from benchmarks.log import log
from benchmarks.report.tables import Finding
from benchmarks.rounds import built, run_once

#: Many files, and a large one.
CASES = (small_files("million", 1_000_000, 1_000), BIG)

_MOST_MIB = 150
#: Seconds between two polls of the worker's processes. The figure of a process is lost when it ends.
_POLL_SECONDS = 0.05


def measure_memory(case: Case, filesystem: Filesystem, service: Service | None) -> Iterator[Finding]:
    """One fork by the engine and one through Redis; both copies are compared."""
    where = f"{case.about}, {filesystem.name}: largest resident memory"
    with built(case, filesystem) as source:
        log(f"memory: {case.name} on {filesystem.name}")
        run = run_once(engine(), filesystem, source, case.files)
        yield Finding(f"{where}, engine and its children", (run.memory or 0) / (1 << 20), "MiB", _MOST_MIB)
        if service is not None:
            with MemoryWatch(service.worker_pid) as watch:
                run_once(service.contender(), filesystem, source, case.files)
            yield Finding(f"{where}, worker and its children", watch.largest / (1 << 20), "MiB", _MOST_MIB)


class MemoryWatch:
    """Polls the memory of a process and its descendants for the time of a with block."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        #: The largest resident memory of any one process so far, in bytes.
        self.largest = 0

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._poll()

    def _watch(self) -> None:
        while not self._ended.wait(_POLL_SECONDS):
            self._poll()

    def _poll(self) -> None:
        self.largest = max(self.largest, *(_high_water(pid) for pid in descendants(self._pid)))


def descendants(pid: int) -> list[int]:
    """The process and all its descendants."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return [pid]
    return [pid, *(member for child in children for member in descendants(int(child)))]


def _high_water(pid: int) -> int:
    """VmHWM in bytes; 0 for a process that has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) << 10
    except (OSError, IndexError):
        return 0
