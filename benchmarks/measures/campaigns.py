"""Campaigns compared with one cp for each fork, two at a time, and with the limit; and a very large campaign."""

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
from benchmarks.contenders.bare_loops import clone_often
from benchmarks.contenders.programs import ContenderFailed
from benchmarks.contenders.service import Service
from benchmarks.copy_check import check_same
from benchmarks.filesystems import Filesystem
from benchmarks.log import log
from benchmarks.measures.memory import MemoryWatch
from benchmarks.measures.snapshot import built_as_subvolume
from benchmarks.report.tables import Finding
from benchmarks.rounds import built, remove, sync

CASES = (MINI, INST)

_ROUNDS = 7
#: Case → number of forks.
_SIZES = {MINI.name: 1000, INST.name: 200}
#: Case and filesystem → the largest ratio of the campaign's time to that of the copies.
_MOST = {(MINI.name, "xfs"): 0.30, (MINI.name, "btrfs"): 0.40, (INST.name, "xfs"): 0.6, (INST.name, "btrfs"): 0.6}
#: The very large campaign, and its targets.
_MANY = 100_000
_MOST_MIB = 200
_LEAST_PACE = 0.8
#: The pace of the first and the last forks is compared: this share of all.
_PART = 0.2
_POLL_SECONDS = 0.25
#: Seconds that one campaign may take.
_CAMPAIGN_SECONDS = 600.0


def measure_campaigns(filesystem: Filesystem, service: Service) -> Iterator[Finding]:
    """Campaigns through Redis, from send_task to the result, compared with `seq N | xargs -P2 cp -a --reflink=always`.

    On btrfs also campaigns of a subvolume, where each fork is one snapshot.
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
    forks, most = _SIZES[case.name], _MOST[case.name, filesystem.name]
    contenders: dict[str, Callable[[Path, Path, int], float]] = {
        "campaign": _campaign(service),
        "cp": _cp,
        "limit": _limit,
    }
    seconds: dict[str, list[float]] = {contender: [] for contender in contenders}
    with build(case, filesystem) as source:
        for number in range(_ROUNDS):
            log(f"campaigns: {forks} forks of {name} on {filesystem.name}, round {number + 1} of {_ROUNDS}")
            for contender, run in contenders.items():
                seconds[contender].append(_once(filesystem, source, case, forks, run, checked=number == 0))
                service.forget_results()
    ours, theirs, least = (median(seconds[contender]) for contender in contenders)
    where = f"{filesystem.name}, {forks} forks of {name}"
    yield Finding(f"{where}: a campaign through Redis", ours * 1e3, "ms")
    yield Finding(f"{where}: xargs -P2 cp", theirs * 1e3, "ms")
    yield Finding(f"{where}: the bare loop in two processes", least * 1e3, "ms")
    yield Finding(f"{where}: the campaign by the copies", ours / theirs, "", most)
    yield Finding(f"{where}: the bare loop by the copies", least / theirs, "")


def measure_large_campaign(filesystem: Filesystem, service: Service) -> Iterator[Finding]:
    """A hundred thousand forks of a source of one file. They are not removed, since the filesystem is."""
    log(f"campaigns: {_MANY:,} forks of one file on {filesystem.name}")
    source, parent = filesystem.path / ONE.name, filesystem.path / "many"
    source.mkdir()
    parent.mkdir()
    ONE.build(source)
    seen: list[tuple[float, int]] = []
    largest = 0
    with MemoryWatch(service.worker_pid) as watch:
        began = time.perf_counter()
        campaign = _send(service, source, parent, _MANY)
        while not campaign.ready():
            if str(campaign.state) == "PROGRESS":
                seen.append((time.perf_counter(), campaign.info["forks_done"]))
            largest = max(largest, int(service.redis.info("memory")["used_memory"]))
            time.sleep(_POLL_SECONDS)
        seconds = time.perf_counter() - began
    if campaign.get()["status"] != "succeeded":
        raise ContenderFailed(f"the campaign ended as {campaign.get()}")
    where = f"{filesystem.name}, {_MANY:,} forks of one file"
    yield Finding(f"{where}: forks a second", _MANY / seconds, "")
    yield Finding(f"{where}: largest resident memory of a process", watch.largest / (1 << 20), "MiB", _MOST_MIB)
    yield Finding(f"{where}: Redis at its peak", largest / (1 << 20), "MiB", _MOST_MIB)
    pace = _pace(seen, 0.0, _PART) / _pace(seen, 1.0 - _PART, 1.0)
    yield Finding(f"{where}: pace at the beginning by that at the end", pace, "", 1 / _LEAST_PACE)


def _campaign(service: Service) -> Callable[[Path, Path, int], float]:
    """Returns a function that runs a campaign through Redis and returns its seconds. Raises ContenderFailed."""

    def run(source: Path, parent: Path, forks: int) -> float:
        began = time.perf_counter()
        result = _send(service, source, parent, forks).get(timeout=_CAMPAIGN_SECONDS)
        seconds = time.perf_counter() - began
        if result["status"] != "succeeded":
            raise ContenderFailed(f"the campaign ended as {result}")
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
    """Seconds of one run after a sync. `checked`: the last fork is compared with the source."""
    parent = filesystem.path / "copies"
    parent.mkdir()
    try:
        sync(filesystem)
        seconds = run(source, parent, forks)
        if checked:
            check_same(source, parent / str(forks), case.files)
        return seconds
    finally:
        remove(parent)


def _pace(seen: list[tuple[float, int]], begin: float, end: float) -> float:
    """Forks a second between the shares `begin` and `end` of all forks."""
    part = [(at, done) for at, done in seen if begin * _MANY <= done <= end * _MANY]
    (first_at, first), (last_at, last) = part[0], part[-1]
    return (last - first) / (last_at - first_at)
