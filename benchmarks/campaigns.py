"""Campaigns beside one cp for each fork, two at a time, and beside the limit; and what a very large one takes."""

from __future__ import annotations

import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from statistics import median
from typing import Any

from celery.result import AsyncResult

from benchmarks.cases import INST, MINI, ONE, Case
from benchmarks.filesystems import Filesystem
from benchmarks.limit import clone_often
from benchmarks.memory import Watch
from benchmarks.report import Finding
from benchmarks.rounds import built, remove, store_result
from benchmarks.same import check_same
from benchmarks.say import say
from benchmarks.service import Service
from benchmarks.snapshot import built_as_subvolume
from benchmarks.subjects import SubjectFailed

CASES = (MINI, INST)

_ROUNDS = 7
#: Case → forks, and the campaign's time by that of the copies at most.
_SIZES = {MINI.name: (1000, 0.40), INST.name: (200, 0.6)}
#: The very large campaign, and its targets.
_MANY = 100_000
_MOST_MIB = 200
_LEAST_PACE = 0.8
#: What part of the forks, at the beginning and at the end, the pace is compared over.
_PART = 0.2
_LOOK_SECONDS = 0.25
#: How long one campaign may take, in seconds.
_PATIENCE = 600.0


def measure_campaigns(filesystem: Filesystem, service: Service) -> Iterator[Finding]:
    """Campaigns through Redis, from send_task to the result, by `seq N | xargs -P2 cp -a --reflink=always`.

    And of a source that can be cloned whole: on btrfs a subvolume, of which each fork is one snapshot.
    """
    for case in CASES:
        yield from _measure(filesystem, service, case, built, case.name)
    if filesystem.name == "btrfs":
        yield from _measure(filesystem, service, INST, built_as_subvolume, f"{INST.name} as a subvolume")


def _measure(
    filesystem: Filesystem,
    service: Service,
    case: Case,
    build: Callable[[Case, Filesystem], AbstractContextManager[Path]],
    name: str,
) -> Iterator[Finding]:
    forks, most = _SIZES[case.name]
    subjects: dict[str, Callable[[Path, Path, int], float]] = {
        "campaign": _campaign(service),
        "cp": _cp,
        "limit": _limit,
    }
    seconds: dict[str, list[float]] = {subject: [] for subject in subjects}
    with build(case, filesystem) as source:
        for number in range(_ROUNDS):
            say(f"campaigns: {forks} forks of {name} on {filesystem.name}, round {number + 1} of {_ROUNDS}")
            for subject, run in subjects.items():
                seconds[subject].append(_once(filesystem, source, case, forks, run, checked=number == 0))
                service.forget_results()
    ours, theirs, least = (median(seconds[subject]) for subject in subjects)
    where = f"{filesystem.name}, {forks} forks of {name}"
    yield Finding(f"{where}: a campaign through Redis", ours * 1e3, "ms")
    yield Finding(f"{where}: xargs -P2 cp", theirs * 1e3, "ms")
    yield Finding(f"{where}: the bare loop in two processes", least * 1e3, "ms")
    yield Finding(f"{where}: the campaign by the copies", ours / theirs, "", most)
    yield Finding(f"{where}: the bare loop by the copies", least / theirs, "")


def measure_large_campaign(filesystem: Filesystem, service: Service) -> Iterator[Finding]:
    """A hundred thousand forks of a source of one file. What it made goes with the filesystem."""
    say(f"campaigns: {_MANY:,} forks of one file on {filesystem.name}")
    source, parent = filesystem.path / ONE.name, filesystem.path / "many"
    source.mkdir()
    parent.mkdir()
    ONE.build(source)
    seen: list[tuple[float, int]] = []
    largest = 0
    with Watch(service.worker_pid) as watch:
        began = time.perf_counter()
        campaign = _send(service, source, parent, _MANY)
        while not campaign.ready():
            if str(campaign.state) == "PROGRESS":
                seen.append((time.perf_counter(), campaign.info["forks_done"]))
            largest = max(largest, int(service.redis.info("memory")["used_memory"]))
            time.sleep(_LOOK_SECONDS)
        seconds = time.perf_counter() - began
    if campaign.get()["status"] != "succeeded":
        raise SubjectFailed(f"the campaign ended as {campaign.get()}")
    where = f"{filesystem.name}, {_MANY:,} forks of one file"
    yield Finding(f"{where}: forks a second", _MANY / seconds, "")
    yield Finding(f"{where}: largest resident memory of a process", watch.largest / (1 << 20), "MiB", _MOST_MIB)
    yield Finding(f"{where}: Redis at its peak", largest / (1 << 20), "MiB", _MOST_MIB)
    pace = _pace(seen, 0.0, _PART) / _pace(seen, 1.0 - _PART, 1.0)
    yield Finding(f"{where}: pace at the beginning by that at the end", pace, "", 1 / _LEAST_PACE)


def _campaign(service: Service) -> Callable[[Path, Path, int], float]:
    """Makes a campaign through Redis; returns how long it took, in seconds. Raises SubjectFailed."""

    def run(source: Path, parent: Path, forks: int) -> float:
        began = time.perf_counter()
        result = _send(service, source, parent, forks).get(timeout=_PATIENCE)
        seconds = time.perf_counter() - began
        if result["status"] != "succeeded":
            raise SubjectFailed(f"the campaign ended as {result}")
        return seconds

    return run


def _send(service: Service, source: Path, parent: Path, forks: int) -> AsyncResult[Any]:
    request = {"source": str(source), "destinations": {"template": f"{parent}/{{n}}", "count": forks}}
    return service.client.send_task(
        "forkvm.campaign", kwargs={"request": request}, task_id=f"bench-{uuid.uuid4().hex}", queue="forkvm"
    )


def _cp(source: Path, parent: Path, forks: int) -> float:
    numbers = "".join(f"{n}\n" for n in range(1, forks + 1)).encode()
    command = ["xargs", "-P2", "-I@", "cp", "-a", "--reflink=always", str(source), f"{parent}/@"]
    began = time.perf_counter()
    subprocess.run(command, input=numbers, check=True)
    return time.perf_counter() - began


def _limit(source: Path, parent: Path, forks: int) -> float:
    began = time.perf_counter()
    clone_often(str(source), [f"{parent}/{n}" for n in range(1, forks + 1)])
    return time.perf_counter() - began


def _once(
    filesystem: Filesystem,
    source: Path,
    case: Case,
    forks: int,
    run: Callable[[Path, Path, int], float],
    *,
    checked: bool,
) -> float:
    """One run with nothing left to be written before it; seconds. `checked`: its last fork is compared."""
    parent = filesystem.path / "copies"
    parent.mkdir()
    try:
        store_result(filesystem)
        seconds = run(source, parent, forks)
        if checked:
            check_same(source, parent / str(forks), case.files)
        return seconds
    finally:
        remove(parent)


def _pace(seen: list[tuple[float, int]], begin: float, end: float) -> float:
    """Forks a second while the share of the forks that were done went from `begin` to `end`."""
    part = [(at, done) for at, done in seen if begin * _MANY <= done <= end * _MANY]
    (first_at, first), (last_at, last) = part[0], part[-1]
    return (last - first) / (last_at - first_at)
