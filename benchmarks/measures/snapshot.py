"""A fork of a btrfs subvolume by one snapshot, compared with a reflink of each file."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from statistics import median

from benchmarks.cases import INST, TREE, Case
from benchmarks.contenders.programs import Contender, cp, engine
from benchmarks.contenders.service import Service
from benchmarks.filesystems import Filesystem, Unavailable
from benchmarks.log import log
from benchmarks.report.tables import Finding
from benchmarks.rounds import built, remove, run_once, sync

CASES = (INST, TREE)

_ROUNDS = 7


def measure_snapshot(filesystem: Filesystem, service: Service | None) -> Iterator[Finding]:
    """Milliseconds of the engine and through Redis, from a subvolume and from a directory; and those of cp."""
    contenders = [engine(), *([service.contender()] if service is not None else [])]
    for case in CASES:
        by_files = _milliseconds(case, built, filesystem, [*contenders, cp(filesystem.reflink)])
        whole = _milliseconds(case, built_as_subvolume, filesystem, contenders)
        yield Finding(f"{filesystem.name}, {case.name}, cp: a reflink of each file", by_files["cp"], "ms")
        for contender in contenders:
            where = f"{filesystem.name}, {case.name}, {contender.name}"
            yield Finding(f"{where}: a reflink of each file", by_files[contender.name], "ms")
            yield Finding(f"{where}: one snapshot", whole[contender.name], "ms")
            yield Finding(f"{where}: the one by the other", whole[contender.name] / by_files[contender.name], "times")


def _milliseconds(
    case: Case,
    build: Callable[[Case, Filesystem], AbstractContextManager[Path]],
    filesystem: Filesystem,
    contenders: list[Contender],
) -> dict[str, float]:
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    with build(case, filesystem) as source:
        for number in range(_ROUNDS):
            log(f"snapshot: {case.name}, round {number + 1} of {_ROUNDS}")
            for contender in contenders:
                files = case.files if number == 0 else None
                seconds[contender.name].append(run_once(contender, filesystem, source, files).seconds)
    return {name: median(measured) * 1e3 for name, measured in seconds.items()}


@contextmanager
def built_as_subvolume(case: Case, filesystem: Filesystem) -> Iterator[Path]:
    """As `rounds.built`, with a subvolume as source. Raises Unavailable if the filesystem has no subvolumes."""
    source = filesystem.path / f"{case.name}-subvolume"
    done = subprocess.run(["btrfs", "subvolume", "create", str(source)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"no subvolume on {filesystem.name}: {done.stderr.strip()}")
    case.build(source)
    sync(filesystem)
    yield source
    remove(source)
