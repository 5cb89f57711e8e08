"""How long it takes until the first file of a fork is there: whether a large tree is walked to its end before."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from benchmarks.cases import INST, WIDE, Case
from benchmarks.filesystems import Filesystem
from benchmarks.report import Finding
from benchmarks.rounds import built, remove, store_result
from benchmarks.say import say
from benchmarks.service import Service
from benchmarks.subjects import Subject, SubjectFailed, engine

CASES = (INST, WIDE)

_ROUNDS = 7
_MOST_MILLISECONDS = 150.0
#: Pause between two looks, in seconds.
_LOOK_SECONDS = 0.001


def measure_first_file(filesystem: Filesystem, service: Service | None) -> Iterator[Finding]:
    """On `wide` minus on `inst`: the engine alone, and through Redis."""
    subjects = [engine(), *([service.subject()] if service is not None else [])]
    inst, wide = (_milliseconds(case, filesystem, subjects) for case in CASES)
    for subject in subjects:
        where = f"{filesystem.name}, {subject.name}: time to the first file"
        yield Finding(f"{where} on inst", inst[subject.name], "ms")
        yield Finding(f"{where} on wide", wide[subject.name], "ms")
        extra = wide[subject.name] - inst[subject.name]
        yield Finding(f"{where}, wide minus inst", extra, "ms", _MOST_MILLISECONDS)


def _milliseconds(case: Case, filesystem: Filesystem, subjects: list[Subject]) -> dict[str, float]:
    seconds: dict[str, list[float]] = {subject.name: [] for subject in subjects}
    with built(case, filesystem) as source:
        for number in range(_ROUNDS):
            say(f"first file: {case.name}, round {number + 1} of {_ROUNDS}")
            for subject in subjects:
                seconds[subject.name].append(_once(subject, filesystem, source))
    return {name: median(measured) * 1e3 for name, measured in seconds.items()}


def _once(subject: Subject, filesystem: Filesystem, source: Path) -> float:
    """Seconds. Raises SubjectFailed."""
    parent = filesystem.path / "copies"
    parent.mkdir()
    try:
        store_result(filesystem)
        watch = _Watch(parent)
        try:
            run = subject.run(source, parent / "copy")
        finally:
            watch.end()
        if watch.seen is None:
            raise SubjectFailed("no file was seen before the fork was complete")
        return watch.seen - run.began
    finally:
        remove(parent)


class _Watch:
    """Looks for a file in the staging tree, or in the published fork, in a thread."""

    def __init__(self, parent: Path) -> None:
        self._parent = parent
        self._over = threading.Event()
        #: When the first file was seen, in seconds of CLOCK_MONOTONIC.
        self.seen: float | None = None
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Look a last time, and look no more."""
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            last = self._over.wait(_LOOK_SECONDS)
            if self._finds_one():
                self.seen = time.perf_counter()
            if last or self.seen is not None:
                return

    def _finds_one(self) -> bool:
        # `.forkvm-<key>` holds the fork's books, `.forkvm-<key>.<attempt>` its tree.
        names = [name for name in os.listdir(self._parent) if "." in name[1:] or not name.startswith(".")]
        return any(_holds_file(self._parent / name) for name in names)


def _holds_file(top: Path) -> bool:
    """Whether there is a regular file in a tree that may change, or be renamed, meanwhile."""
    return any(files for _, _, files in os.walk(top))
