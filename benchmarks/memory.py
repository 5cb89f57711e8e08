"""The largest resident memory of any process while a fork is made."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

from benchmarks.cases import BIG, Case, small_files
from benchmarks.filesystems import Filesystem
from benchmarks.report import Finding
from benchmarks.rounds import built, run_once
from benchmarks.say import say
from benchmarks.service import Service
from benchmarks.subjects import engine

#: Many files, and a large one.
CASES = (small_files("million", 1_000_000, 1_000), BIG)

_MOST_MIB = 150
#: Pause between two looks at the worker's processes, in seconds; a process that ends takes its figure with it.
_LOOK_SECONDS = 0.05


def measure_memory(case: Case, filesystem: Filesystem, service: Service | None) -> Iterator[Finding]:
    """One fork by the engine, one through Redis; each checked."""
    where = f"{case.about}, {filesystem.name}: largest resident memory"
    with built(case, filesystem) as source:
        say(f"memory: {case.name} on {filesystem.name}")
        run = run_once(engine(), filesystem, source, case.files)
        yield Finding(f"{where}, engine and its children", (run.memory or 0) / (1 << 20), "MiB", _MOST_MIB)
        if service is not None:
            with Watch(service.worker_pid) as watch:
                run_once(service.subject(), filesystem, source, case.files)
            yield Finding(f"{where}, worker and its children", watch.largest / (1 << 20), "MiB", _MOST_MIB)


class Watch:
    """Looks at a process and its children now and then, for the time of a with block."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        #: Bytes, of any one process at any time of its life.
        self.largest = 0

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._over.wait(_LOOK_SECONDS):
            self._look()

    def _look(self) -> None:
        self.largest = max(self.largest, *(_high_water(pid) for pid in _family(self._pid)))


def _family(pid: int) -> list[int]:
    """The process and all that descend from it."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return [pid]
    return [pid, *(member for child in children for member in _family(int(child)))]


def _high_water(pid: int) -> int:
    """VmHWM in bytes; 0 for a process that has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) << 10
    except (OSError, IndexError):
        return 0
