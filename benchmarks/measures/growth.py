"""Whether the time per file stays the same as a tree grows."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from benchmarks.cases import Case, small_files
from benchmarks.contenders.programs import Contender, engine
from benchmarks.contenders.service import Service
from benchmarks.filesystems import Filesystem
from benchmarks.log import log
from benchmarks.report.tables import Finding
from benchmarks.rounds import built, run_once

#: Two trees of the same shape, 1,000 files a directory, and the number of rounds of each.
_FEW = small_files("ten thousand", 10_000, 10)
_MANY = small_files("million", 1_000_000, 1_000)
_FEW_ROUNDS, _MANY_ROUNDS = 7, 3

CASES = (_FEW, _MANY)

_MOST_RATIO = 1.3


def measure_growth(filesystem: Filesystem, service: Service | None) -> Iterator[Finding]:
    """Time per file at a million files divided by that at ten thousand, for the engine and through Redis."""
    contenders = [engine(), *([service.contender()] if service is not None else [])]
    few = _microseconds_a_file(_FEW, _FEW_ROUNDS, filesystem, contenders)
    many = _microseconds_a_file(_MANY, _MANY_ROUNDS, filesystem, contenders)
    for contender in contenders:
        where = f"{filesystem.name}, {contender.name}: time per file"
        yield Finding(f"{where} at 10,000 files", few[contender.name], "µs")
        yield Finding(f"{where} at 1,000,000 files", many[contender.name], "µs")
        most = _MOST_RATIO if contender.name == "engine" else None
        yield Finding(f"{where}, the one by the other", many[contender.name] / few[contender.name], "times", most)


def _microseconds_a_file(
    case: Case, rounds: int, filesystem: Filesystem, contenders: list[Contender]
) -> dict[str, float]:
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    with built(case, filesystem) as source:
        for number in range(rounds):
            log(f"growth: {case.name}, round {number + 1} of {rounds}")
            for contender in contenders:
                files = case.files if number == 0 else None
                seconds[contender.name].append(run_once(contender, filesystem, source, files).seconds)
    return {name: median(measured) / case.files * 1e6 for name, measured in seconds.items()}
