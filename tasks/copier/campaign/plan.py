"""Planning a campaign: one walk of the source, whether it can be reflinked, and how many forks a task makes.

The campaign's control directory is beside its first destination, its *home*. It holds the manifests and the list of
destinations. Each further parent gets a control directory of the same name without these files, so that every tree has
a control directory beside it.
"""

from __future__ import annotations

import itertools
import logging
import os
import time
import zlib
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

from tasks.copier import validation
from tasks.copier.campaign.spec import CampaignSpec
from tasks.copier.clone.file import Cloner
from tasks.copier.endpoints import Endpoints
from tasks.copier.errors import ForkError
from tasks.copier.fork.chunk import MAX_TRIES, worker_lost
from tasks.copier.fork.plan import Plan, make_plan
from tasks.copier.fork.snapshot import is_wanted, is_whole_subvolume
from tasks.copier.kernel.processes import open_files_limit
from tasks.copier.options import Limits
from tasks.copier.progress import Ticker
from tasks.copier.report import Fallback, Report, fallback_of, unpack_pages
from tasks.copier.roots import PATH_MAX, Roots, normal_path
from tasks.copier.space.reservation import job_of
from tasks.copier.space.room import Room
from tasks.copier.staging.journal import Phase
from tasks.copier.staging.staging import Staging
from tasks.copier.staging.workspace import open_work

log = logging.getLogger(__name__)

#: How long one batch should take, in seconds: a single fork in the queue does not wait long for it.
BATCH_SECONDS = 0.125
#: Most forks in a batch: each needs file descriptors, and a process may have 1,024 by default.
MOST_IN_BATCH = 128
#: A small campaign is cut into at least this many batches, so that all processes share it.
LEAST_BATCHES = 8
#: Most batches of one campaign in the queue at once: the most processes that work on it, and the most messages before
#: those of other jobs.
_MOST_LANES = 16
#: Estimated seconds for each fork, for each entry of it, and for each byte that is copied, with two processes at work.
_FORK_SECONDS = 250e-6
_ENTRY_SECONDS = 100e-6
_BYTE_SECONDS = 1e-9
#: A snapshot costs a commit of the filesystem: smaller sources than these, in entries and in bytes, are cloned file by
#: file.
_SNAPSHOT_ENTRIES = 200
_SNAPSHOT_BYTES = 256 << 20
#: The time of a reflink is used for the estimate from this file size on, in bytes: below it varies too much.
_LEAST_TIMED_BYTES = 1 << 20
#: Limits that put the whole source into one chunk: the forks of a campaign are not divided.
_WHOLE = Limits(inline_files=1 << 62, inline_bytes=1 << 62)

#: Open files of a batch for each of its trees, and the other open files of the process.
_FILES_OF_TREE = 3
_OTHER_FILES = 64

_DESTINATIONS = "destinations"
#: Destinations that are read at a time to find the home: nearly always it is the first.
_HOME_SLICE = 100


@dataclass(frozen=True, kw_only=True)
class CampaignPlan:
    """How a campaign is made. Its size does not depend on the number of forks."""

    #: The plan of each fork.
    fork: Plan
    fallback: Fallback | None
    #: Forks in a batch, and batches in the queue at once.
    batch: int
    lanes: int
    #: Whether each fork should be a snapshot of the source, a btrfs subvolume.
    snapshot: bool
    #: The parent directory of the home, as the request names it.
    parent: str

    def to_data(self) -> dict[str, Any]:
        """Plain data for the journal."""
        return {**vars(self), "fork": self.fork.to_data()}

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> CampaignPlan:
        """The plan that `to_data` returned. Raises ForkError (Malformed) for anything else."""
        with validation.reading("the campaign's plan"):
            return cls(
                **{
                    **data,
                    "fork": Plan.from_data(data["fork"]),
                    "fallback": fallback_of(data["fallback"]),
                    "batch": validation.integer(data["batch"], start=1),
                    "lanes": validation.integer(data["lanes"], start=1),
                    "snapshot": validation.boolean(data["snapshot"]),
                    "parent": validation.absolute_path(data["parent"]),
                }
            )


@dataclass(frozen=True)
class Campaign:
    """A planned campaign, open in this process, which holds its control directory."""

    staging: Staging
    spec: CampaignSpec
    plan: CampaignPlan
    #: When it was planned, in seconds since the epoch.
    planned_at: float

    @cached_property
    def home(self) -> str:
        """The first destination beside the control directory: errors of the whole campaign name it."""
        parts = (self.destinations(first, _HOME_SLICE) for first in range(0, self.spec.aims.count, _HOME_SLICE))
        return next(path for part in parts for path in part if os.path.dirname(path) == self.plan.parent)

    def destinations(self, first: int, count: int) -> list[str]:
        """The destinations of `count` forks (fewer at the end), beginning with the index `first`."""
        return _read_destinations(self.staging, self.spec.aims.count, first, count)


def plan_campaign(ends: Endpoints, staging: Staging, spec: CampaignSpec, paths: Iterable[str], ticker: Ticker) -> None:
    """Plan the campaign. `staging` is held exclusively; `ends` are the source and the campaign's home.

    Raises ForkError (as `make_plan` does, and worker_lost), and OSError.
    """
    journal = staging.journal()
    if journal is not None and journal.tries >= MAX_TRIES:
        raise worker_lost(spec.source)
    journal = staging.begin(spec.to_data(), journal)
    try:
        # The walk makes directories, and the largest files are cloned to find out whether a reflink works: in a tree
        # that is removed afterwards.
        with open_work(ends, staging, spec.options, staging.make_tree(journal)) as work:
            cloner, report = Cloner(spec.options, {}, ticker.step), Report()
            room = Room(work.tree_fd, ends.destination, job_of(staging.fd))
            try:
                plan = make_plan(work, _WHOLE, cloner, ticker, report, room)
            finally:
                room.leave()  # each batch reserves what it copies
    finally:
        staging.discard_tree(journal)
    _write_destinations(staging, paths)
    seconds = _expected_seconds(plan, report)
    large = plan.entries >= _SNAPSHOT_ENTRIES or plan.bytes >= _SNAPSHOT_BYTES
    snapshot = large and is_wanted(spec.options) and is_whole_subvolume(ends.source_fd)
    batch = _batch_size(spec, seconds)
    parallel = spec.aims.max_parallel
    lanes = _MOST_LANES if parallel is None else min(_MOST_LANES, max(1, parallel // batch))
    made = CampaignPlan(
        fork=plan,
        fallback=cloner.fallback,
        batch=batch,
        lanes=lanes,
        snapshot=snapshot,
        parent=os.path.dirname(ends.destination),
    )
    staging.write_journal(replace(journal, phase=Phase.CLONING, plan=made.to_data(), planned_at=time.time()))


@contextmanager
def open_campaign(
    roots: Roots, home: str, campaign_id: str, wait: float, *, alone: bool = False
) -> Iterator[Campaign | None]:
    """Hold a planned campaign, shared or exclusively (`alone`). Yields None if there is none.

    `home` is its first destination. Raises Held if another process holds it for `wait` seconds, ForkError and OSError.
    """
    with (
        roots.open_parent(home) as parent,
        Staging.attach(parent.fd, campaign_id, wait, alone=alone) as staging,
    ):
        yield None if staging is None else campaign_in(staging)


def campaign_in(staging: Staging) -> Campaign | None:
    """The campaign whose control directory is held. None if it is not planned, or its plan is damaged.

    Raises NotOurs (a ForkError), and OSError.
    """
    journal = staging.own_journal()
    if journal is None or not journal.is_campaign or journal.phase is not Phase.CLONING or journal.plan is None:
        return None
    try:
        spec, plan = CampaignSpec.from_data(journal.spec), CampaignPlan.from_data(journal.plan)
    except validation.Malformed as error:
        log.warning("the plan of the campaign %r is damaged; planning it again: %s", journal.job_id, error)
        return None
    return Campaign(staging, spec, plan, journal.planned_at)


def find_home(roots: Roots, paths: Iterable[str]) -> str:
    """The first destination whose parent can be opened. If there is none, raises the ForkError of the first."""
    first: ForkError | None = None
    tried: set[str] = set()
    for path in paths:
        parent = os.path.dirname(path)
        if parent in tried:
            continue
        tried.add(parent)
        try:
            with roots.open_parent(path):
                return path
        except ForkError as error:
            first = first or error
    raise first or AssertionError("a campaign has destinations")


def _expected_seconds(plan: Plan, report: Report) -> float:
    """The estimated seconds for one fork. The time of large reflinks is estimated from that of the largest file."""
    seconds = _FORK_SECONDS + plan.entries * _ENTRY_SECONDS
    probe = next(unpack_pages(report.close()), None)
    if probe is not None and probe["bytes"] >= _LEAST_TIMED_BYTES:
        return seconds + probe["seconds"] * plan.bytes / probe["bytes"]
    if probe is not None and probe["method"] == "reflink":
        return seconds
    return seconds + plan.bytes * _BYTE_SECONDS


def _batch_size(spec: CampaignSpec, seconds: float) -> int:
    """Forks in a batch, so that two batches fit into `max_parallel`; preferably an even number of batches."""
    count = spec.aims.count
    parallel = spec.aims.max_parallel
    most = min(
        MOST_IN_BATCH,
        -(-count // LEAST_BATCHES),
        count if parallel is None else max(1, parallel // 2),
        (open_files_limit() - _OTHER_FILES) // _FILES_OF_TREE,
    )
    wanted = max(1, min(most, int(BATCH_SECONDS / seconds)))
    if wanted >= count:
        return count
    pairs = -(-count // (2 * wanted))
    return -(-count // (2 * pairs))


# -- the list of destinations: the offset of each, and of the end; a checksum of each; then all paths

_OFFSET_BYTES, _CHECK_BYTES = 8, 4


def _write_destinations(staging: Staging, paths: Iterable[str]) -> None:
    names = [os.fsencode(path) for path in paths]
    offsets = array("Q", [0])
    for name in names:
        offsets.append(offsets[-1] + len(name))
    checks = array("I", map(_check, names, itertools.count()))
    staging.write_file(_DESTINATIONS, b"".join([offsets.tobytes(), checks.tobytes(), *names]))


def _read_destinations(staging: Staging, total: int, first: int, wanted: int) -> list[str]:
    """Some of the destinations. Raises ForkError (Malformed) if the list is damaged."""
    wanted = max(0, min(wanted, total - first))
    fd = staging.open_file(_DESTINATIONS)
    try:
        with validation.reading("the list of destinations"):
            offsets, checks = array("Q"), array("I")
            offsets.frombytes(os.pread(fd, (wanted + 1) * _OFFSET_BYTES, first * _OFFSET_BYTES))
            begin = (total + 1) * _OFFSET_BYTES
            checks.frombytes(os.pread(fd, wanted * _CHECK_BYTES, begin + first * _CHECK_BYTES))
            at, length = offsets[0], offsets[-1] - offsets[0]
            if len(offsets) <= wanted or not 0 <= length <= wanted * PATH_MAX:
                raise validation.Malformed(f"the offsets of {wanted} paths from number {first} on are wrong")
            names = os.pread(fd, length, begin + total * _CHECK_BYTES + at)
            paths = [names[start - at : end - at] for start, end in pairwise(offsets)]
            if list(map(_check, paths, itertools.count(first))) != checks.tolist():
                raise validation.Malformed(f"a checksum of {wanted} paths from number {first} on does not match")
            return list(map(_destination_of, paths))
    finally:
        os.close(fd)


def _check(path: bytes, index: int) -> int:
    """A checksum of one destination. Without it, a fork could be published at a damaged path."""
    return zlib.crc32(path, index & 0xFFFFFFFF)


def _destination_of(path: bytes) -> str:
    destination = os.fsdecode(path)
    with suppress(ForkError):
        if normal_path(destination, "destination") == destination:
            return destination
    raise validation.Malformed(f"{destination!r:.80} is not a destination")
