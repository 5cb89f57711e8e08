"""The time until the first file of a fork exists: forkvm must not walk a large tree to its end before."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from benchmarks.cases import INST, WIDE, Case
from benchmarks.contenders.programs import Contender, ContenderFailed, engine
from benchmarks.contenders.service import Service
from benchmarks.filesystems import Filesystem
from benchmarks.log import log
from benchmarks.report.tables import Finding
from benchmarks.rounds import built, remove, sync

CASES = (INST, WIDE)

_ROUNDS = 7
_MOST_MILLISECONDS = 150.0
#: Seconds between two polls.
_POLL_SECONDS = 0.001


def measure_first_file(filesystem: Filesystem, service: Service | None) -> Iterator[Finding]:
    """The time on `wide` minus the time on `inst`, for the engine and through Redis."""
    contenders = [engine(), *([service.contender()] if service is not None else [])]
    inst, wide = (_milliseconds(case, filesystem, contenders) for case in CASES)
    for contender in contenders:
        where = f"{filesystem.name}, {contender.name}: time to the first file"
        yield Finding(f"{where} on inst", inst[contender.name], "ms")
        yield Finding(f"{where} on wide", wide[contender.name], "ms")
        extra = wide[contender.name] - inst[contender.name]
        yield Finding(f"{where}, wide minus inst", extra, "ms", _MOST_MILLISECONDS)


def _milliseconds(case: Case, filesystem: Filesystem, contenders: list[Contender]) -> dict[str, float]:
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    with built(case, filesystem) as source:
        for number in range(_ROUNDS):
            log(f"first file: {case.name}, round {number + 1} of {_ROUNDS}")
            for contender in contenders:
                seconds[contender.name].append(_once(contender, filesystem, source))
    return {name: median(measured) * 1e3 for name, measured in seconds.items()}


def _once(contender: Contender, filesystem: Filesystem, source: Path) -> float:
    """Seconds until the first file. Raises ContenderFailed."""
    parent = filesystem.path / "copies"
    parent.mkdir()
    try:
        sync(filesystem)
        watch = _Watch(parent)
        try:
            run = contender.run(source, parent / "copy")
        finally:
            watch.end()
        if watch.seen is None:
            raise ContenderFailed("no file was seen before the fork was complete")
        return watch.seen - run.began
    finally:
        remove(parent)


class _Watch:
    """A thread that polls the staging tree and the published fork for a file."""

    def __init__(self, parent: Path) -> None:
        self._parent = parent
        self._ended = threading.Event()
        #: When the first file was seen, in seconds of CLOCK_MONOTONIC.
        self.seen: float | None = None
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Poll a last time, then stop."""
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            last = self._ended.wait(_POLL_SECONDS)
            if self._file_exists():
                self.seen = time.perf_counter()
            if last or self.seen is not None:
                return

    def _file_exists(self) -> bool:
        # `.forkvm-<key>` is the control directory, `.forkvm-<key>.<attempt>` the staging tree.
        names = [name for name in os.listdir(self._parent) if "." in name[1:] or not name.startswith(".")]
        return any(_holds_file(self._parent / name) for name in names)


def _holds_file(top: Path) -> bool:
    """Whether a tree, which may change or be renamed meanwhile, has a regular file."""
    return any(files for _, _, files in os.walk(top))
