"""What the report of a fork or campaign says, gathered from its results."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple

from tasks.copier.campaign.spec import CampaignResult
from tasks.copier.errors import ErrorRecord
from tasks.copier.fork_spec import ForkResult
from tasks.copier.report import FileResult
from worker.commands.output import size
from worker.commands.report.durations import Durations

#: The most slow items and failures on a page.
MOST_SLOWEST, MOST_FAILURES = 20, 100


class Method(NamedTuple):
    """How entries were cloned."""

    name: str
    entries: int
    #: Logical bytes; None where the method has none.
    bytes: int | None


class Item(NamedTuple):
    """One file of a fork, or one fork of a campaign."""

    name: str
    seconds: float
    detail: str


class Failure(NamedTuple):
    """One file or fork that failed."""

    name: str
    error: ErrorRecord


@dataclass
class Contents:
    """The contents of a report. Texts are as clients and guests chose them, not escaped."""

    kind: str
    id: str
    status: str
    source: str
    destination: str
    error: ErrorRecord | None
    facts: list[tuple[str, str]]
    #: Seconds by phase.
    phases: list[tuple[str, float]]
    methods: list[Method]
    #: What the items are: "entries" or "forks".
    items: str
    slowest: list[Item] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    failures_total: int = 0
    durations: Durations = field(default_factory=Durations)


def contents_of_fork(result: ForkResult, files: Iterable[FileResult]) -> Contents:
    """The report of a fork. `files` is read once, and may be long."""
    contents = Contents(
        kind="Fork",
        id=result["fork_id"],
        status=result["status"],
        source=result["source"],
        destination=result["destination"],
        error=result["error"],
        facts=[*_facts_of_fork(result)],
        phases=_phases(result["seconds"]),
        methods=_methods(result["files"], result["bytes"]),
        items="entries",
    )
    _gather(contents, files, _file)
    return contents


def contents_of_campaign(result: CampaignResult, forks: Iterable[ForkResult]) -> Contents:
    """The report of a campaign. `forks` is read once, and may be long."""
    contents = Contents(
        kind="Campaign",
        id=result["campaign_id"],
        status=result["status"],
        source=result["source"],
        destination=f"{result['forks']['total']:,} forks",
        error=result["error"],
        facts=[*_facts_of_campaign(result)],
        phases=_phases(result["seconds"]),
        methods=_methods(result["files"], result["bytes"]),
        items="forks",
    )
    _gather(contents, forks, _fork)
    return contents


def _gather(contents: Contents, results: Iterable[Any], read: Callable[[Any], tuple[Item, ErrorRecord | None]]) -> None:
    """Count the durations, and keep the slowest items and the first failures. The job's own failure is the first."""
    slowest: list[tuple[float, int, Item]] = []
    if contents.error is not None:
        _add_failure(contents, contents.id, contents.error)
    for number, result in enumerate(results):
        item, error = read(result)
        if error is not None:
            if error != contents.error:  # most often the fork fails with the error of one file
                _add_failure(contents, item.name, error)
        elif item.seconds > 0:
            contents.durations.add(item.seconds)
            push = heapq.heappush if len(slowest) < MOST_SLOWEST else heapq.heappushpop
            push(slowest, (item.seconds, -number, item))
    contents.slowest = [item for _, _, item in sorted(slowest, reverse=True)]


def _add_failure(contents: Contents, name: str, error: ErrorRecord) -> None:
    contents.failures_total += 1
    if len(contents.failures) < MOST_FAILURES:
        contents.failures.append(Failure(name, error))


def _file(result: FileResult) -> tuple[Item, ErrorRecord | None]:
    return Item(result["path"], result["seconds"], f"{result['method']}, {size(result['bytes'])}"), result["error"]


def _fork(result: ForkResult) -> tuple[Item, ErrorRecord | None]:
    name = f"{result['fork_id']}: {result['destination']}"
    detail = f"{result['files']['total']:,} entries, {size(result['bytes']['logical'])}"
    return Item(name, result["seconds"]["total"], detail), result["error"]


def _facts_of_fork(result: ForkResult) -> Iterator[tuple[str, str]]:
    for name, moment in (("Started", result["started_at"]), ("Finished", result["finished_at"])):
        yield name, datetime.fromisoformat(moment).strftime("%Y-%m-%d %H:%M:%S UTC")
    yield from _amounts(result["files"], result["bytes"])
    yield "Parts", str(result["chunks"])
    if result["subvolume"]:
        yield "Subvolume", "made by a btrfs snapshot"
    if result["fallback"] is not None:
        fallback = result["fallback"]
        yield "Not reflinked", f"{fallback['reason']} (first at {fallback['path']})"
    if result["metadata_lost_total"]:
        first = result["metadata_lost"][0] if result["metadata_lost"] else None
        where = "" if first is None else f" (first {first['what']} of {first['path']})"
        yield "Metadata lost", f"{result['metadata_lost_total']:,} items that the destination cannot store{where}"
    labels = result["labels"]
    if labels:
        pairs = labels if isinstance(labels, list) else [f"{key}={value}" for key, value in labels.items()]
        yield "Labels", ", ".join(pairs)


def _facts_of_campaign(result: CampaignResult) -> Iterator[tuple[str, str]]:
    forks = result["forks"]
    yield "Succeeded", f"{forks['succeeded']:,} of {forks['total']:,} forks"
    yield "Failed", f"{forks['failed']:,}"
    yield "Cancelled", f"{forks['cancelled']:,}"
    yield "Rate", f"{result['forks_per_second']:,.1f} forks a second"
    yield from _amounts(result["files"], result["bytes"])


def _amounts(files: Mapping[str, int], count: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    yield "Entries", f"{files['total']:,}"
    yield "Size", size(count["logical"])
    yield "Reflinked", size(count["reflinked"])
    yield "Copied", size(count["copied"])


def _phases(seconds: Mapping[str, float]) -> list[tuple[str, float]]:
    return [(name, value) for name, value in seconds.items() if name != "total"]


def _methods(files: Mapping[str, int], count: Mapping[str, int]) -> list[Method]:
    return [Method(name, entries, count.get(name)) for name, entries in files.items() if name != "total" and entries]
