"""Whether the time per file stays the same as a tree grows."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from benchmarks.cases import Case, small_files
from benchmarks.filesystems import Filesystem
from benchmarks.report import Finding
from benchmarks.rounds import built, run_once
from benchmarks.say import say
from benchmarks.service import Service
from benchmarks.subjects import Subject, engine

#: The same shape twice, 1,000 files a directory, and how often each is forked.
_FEW = small_files("ten thousand", 10_000, 10)
_MANY = small_files("million", 1_000_000, 1_000)
_FEW_ROUNDS, _MANY_ROUNDS = 7, 3

CASES = (_FEW, _MANY)

_MOST_RATIO = 1.3


def measure_growth(filesystem: Filesystem, service: Service | None) -> Iterator[Finding]:
    """Time per file at a million files by that at ten thousand: the engine alone, and through Redis."""
    subjects = [engine(), *([service.subject()] if service is not None else [])]
    few = _microseconds_a_file(_FEW, _FEW_ROUNDS, filesystem, subjects)
    many = _microseconds_a_file(_MANY, _MANY_ROUNDS, filesystem, subjects)
    for subject in subjects:
        where = f"{filesystem.name}, {subject.name}: time per file"
        yield Finding(f"{where} at 10,000 files", few[subject.name], "µs")
        yield Finding(f"{where} at 1,000,000 files", many[subject.name], "µs")
        most = _MOST_RATIO if subject.name == "engine" else None
        yield Finding(f"{where}, the one by the other", many[subject.name] / few[subject.name], "times", most)


def _microseconds_a_file(case: Case, rounds: int, filesystem: Filesystem, subjects: list[Subject]) -> dict[str, float]:
    seconds: dict[str, list[float]] = {subject.name: [] for subject in subjects}
    with built(case, filesystem) as source:
        for number in range(rounds):
            say(f"growth: {case.name}, round {number + 1} of {rounds}")
            for subject in subjects:
                files = case.files if number == 0 else None
                seconds[subject.name].append(run_once(subject, filesystem, source, files).seconds)
    return {name: median(measured) / case.files * 1e6 for name, measured in seconds.items()}
