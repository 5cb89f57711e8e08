"""Figures that the table does not show, each measured on request (`--measure NAME`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks.cases import ONE, Case
from benchmarks.contenders.service import Service
from benchmarks.filesystems import Filesystem, Unavailable
from benchmarks.log import log
from benchmarks.measures import (
    campaigns,
    first_file,
    growth,
    load,
    memory,
    messages,
    metrics,
    neighbour,
    small_forks,
    snapshot,
)
from benchmarks.plan import Plan, open_filesystem
from benchmarks.report.tables import Finding

#: Most measures use this filesystem.
_KIND = "xfs"
#: The copy of the dense file is measured where nothing can be reflinked.
_COPY_KIND = "ext4"
#: Small forks and campaigns are measured on each filesystem with reflinks.
_REFLINK_KINDS = ("xfs", "btrfs")

#: Takes the plan, the directory that holds all filesystems, and the service if there is one. Raises Unavailable.
Measure = Callable[[Plan, Path, Service | None], list[Finding]]


def _memory(plan: Plan, root: Path, service: Service | None) -> list[Finding]:
    found: list[Finding] = []
    for kind, case in zip((_KIND, _COPY_KIND), memory.CASES, strict=True):
        with open_filesystem(plan, kind, [case], root) as (filesystem, _):
            found += memory.measure_memory(case, filesystem, service)
    return found


def _growth(plan: Plan, root: Path, service: Service | None) -> list[Finding]:
    return _on_one(plan, root, growth.CASES, lambda filesystem: growth.measure_growth(filesystem, service))


def _messages(plan: Plan, root: Path, service: Service | None) -> list[Finding]:
    return _with_service(plan, root, service, messages.CASES, messages.measure_messages)


def _metrics(plan: Plan, root: Path, service: Service | None) -> list[Finding]:
    return _with_service(plan, root, service, metrics.CASES, metrics.measure_metrics)


def _first_file(plan: Plan, root: Path, service: Service | None) -> list[Finding]:
    return _on_one(plan, root, first_file.CASES, lambda filesystem: first_file.measure_first_file(filesystem, service))


def _snapshot(plan: Plan, root: Path, service: Service | None) -> list[Finding]:
    return _on_one(
        plan, root, snapshot.CASES, lambda filesystem: snapshot.measure_snapshot(filesystem, service), "btrfs"
    )


def _neighbour(plan: Plan, root: Path, service: Service | None) -> list[Finding]:
    return _on_one(plan, root, neighbour.CASES, neighbour.measure_neighbour, _COPY_KIND)


def _small_forks(plan: Plan, root: Path, service: Service | None) -> list[Finding]:
    return _on_each_reflink(plan, root, service, small_forks.CASES, small_forks.measure_small_forks)


def _load(plan: Plan, root: Path, service: Service | None) -> list[Finding]:
    return _on_each_reflink(plan, root, service, load.CASES, load.measure_load)


def _campaigns(plan: Plan, root: Path, service: Service | None) -> list[Finding]:
    return _on_each_reflink(plan, root, service, campaigns.CASES, campaigns.measure_campaigns)


def _large_campaign(plan: Plan, root: Path, service: Service | None) -> list[Finding]:
    return _with_service(plan, root, service, [ONE], campaigns.measure_large_campaign)


def _on_each_reflink(
    plan: Plan,
    root: Path,
    service: Service | None,
    cases: Sequence[Case],
    measure: Callable[[Filesystem, Service], Iterator[Finding]],
) -> list[Finding]:
    if service is None:
        log("Redis is not available: not measured")
        return []
    found: list[Finding] = []
    kinds = plan.kinds if plan.directory is not None else [kind for kind in _REFLINK_KINDS if kind in plan.kinds]
    for kind in kinds:
        with open_filesystem(plan, kind, cases, root) as (filesystem, _):
            found += measure(filesystem, service)
    return found


def _with_service(
    plan: Plan,
    root: Path,
    service: Service | None,
    cases: Sequence[Case],
    measure: Callable[[Filesystem, Service], Iterator[Finding]],
) -> list[Finding]:
    if service is None:
        log("Redis is not available: not measured")
        return []
    return _on_one(plan, root, cases, lambda filesystem: measure(filesystem, service))


def _on_one(
    plan: Plan,
    root: Path,
    cases: Sequence[Case],
    measure: Callable[[Filesystem], Iterator[Finding]],
    kind: str = _KIND,
) -> list[Finding]:
    with open_filesystem(plan, kind, cases, root) as (filesystem, fitting):
        if len(fitting) < len(cases):
            raise Unavailable("not enough free space for all cases")
        return list(measure(filesystem))


#: By the name that `--measure` takes.
MEASURES: dict[str, Measure] = {
    "memory": _memory,
    "growth": _growth,
    "messages": _messages,
    "metrics": _metrics,
    "first-file": _first_file,
    "snapshot": _snapshot,
    "neighbour": _neighbour,
    "singles": _small_forks,
    "load": _load,
    "campaigns": _campaigns,
    "large-campaign": _large_campaign,
}
