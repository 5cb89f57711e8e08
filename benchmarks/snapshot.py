"""A fork of a btrfs subvolume by one snapshot, beside that of the same files by a reflink of each."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from statistics import median

from benchmarks.cases import INST, TREE, Case
from benchmarks.filesystems import Filesystem, Unavailable
from benchmarks.report import Finding
from benchmarks.rounds import built, remove, run_once, store_result
from benchmarks.say import say
from benchmarks.service import Service
from benchmarks.subjects import Subject, cp, engine

CASES = (INST, TREE)

_ROUNDS = 7


def measure_snapshot(filesystem: Filesystem, service: Service | None) -> Iterator[Finding]:
    """Milliseconds of the engine alone, and through Redis, from a subvolume and from a plain directory; those of cp."""
    subjects = [engine(), *([service.subject()] if service is not None else [])]
    for case in CASES:
        by_files = _milliseconds(case, built, filesystem, [*subjects, cp(filesystem.reflink)])
        whole = _milliseconds(case, built_as_subvolume, filesystem, subjects)
        yield Finding(f"{filesystem.name}, {case.name}, cp: a reflink of each file", by_files["cp"], "ms")
        for subject in subjects:
            where = f"{filesystem.name}, {case.name}, {subject.name}"
            yield Finding(f"{where}: a reflink of each file", by_files[subject.name], "ms")
            yield Finding(f"{where}: one snapshot", whole[subject.name], "ms")
            yield Finding(f"{where}: the one by the other", whole[subject.name] / by_files[subject.name], "times")


def _milliseconds(
    case: Case,
    build: Callable[[Case, Filesystem], AbstractContextManager[Path]],
    filesystem: Filesystem,
    subjects: list[Subject],
) -> dict[str, float]:
    seconds: dict[str, list[float]] = {subject.name: [] for subject in subjects}
    with build(case, filesystem) as source:
        for number in range(_ROUNDS):
            say(f"snapshot: {case.name}, round {number + 1} of {_ROUNDS}")
            for subject in subjects:
                files = case.files if number == 0 else None
                seconds[subject.name].append(run_once(subject, filesystem, source, files).seconds)
    return {name: median(measured) * 1e3 for name, measured in seconds.items()}


@contextmanager
def built_as_subvolume(case: Case, filesystem: Filesystem) -> Iterator[Path]:
    """As `rounds.built`; raises Unavailable where the filesystem knows no subvolumes."""
    source = filesystem.path / f"{case.name}-subvolume"
    done = subprocess.run(["btrfs", "subvolume", "create", str(source)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"no subvolume on {filesystem.name}: {done.stderr.strip()}")
    case.build(source)
    store_result(filesystem)
    yield source
    remove(source)
