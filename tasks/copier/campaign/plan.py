"""Planning a campaign: its one walk of the source, what the filesystems can, and how many forks a task makes.

The campaign's control directory stands beside its first destination, its *home*; there lie the manifests and the list
of destinations. Further parents get a control directory of the same name, without these, so that every tree in the
making has one beside it.
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
from tasks.copier.staging.journal import Phase
from tasks.copier.staging.staging import Staging
from tasks.copier.staging.workspace import open_work

log = logging.getLogger(__name__)

#: About how long one batch is to take, in seconds: short enough that a single fork does not wait for it.
BATCH_SECONDS = 0.125
#: Most forks a batch: each needs descriptors, of which a process has 1,024 by default.
MOST_IN_BATCH = 128
#: A small campaign is cut into at least so many batches, so that all processes have a part of it.
LEAST_BATCHES = 8
#: Most batches of one campaign that are in the queue at once: so many processes can work on it, and so little waits
#: before the batches of others.
_MOST_LANES = 16
#: What is reckoned for each fork, for each entry of it, and for each byte that is copied, in seconds, where two
#: processes work side by side.
_FORK_SECONDS = 250e-6
_ENTRY_SECONDS = 100e-6
_BYTE_SECONDS = 1e-9
#: A snapshot costs a commit of the filesystem: smaller sources than these, in entries and in bytes, are cloned file by
#: file.
_SNAPSHOT_ENTRIES = 200
_SNAPSHOT_BYTES = 256 << 20
#: What a smaller file took tells more of that moment than of the file, in bytes.
_TELLING_BYTES = 1 << 20
#: The whole source at once: a campaign's forks are not cut into chunks.
_WHOLE = Limits(inline_files=1 << 62, inline_bytes=1 << 62)

#: Files that a batch has open at once: of each of its trees, and beside them those of the process.
_FILES_OF_TREE = 3
_OTHER_FILES = 64

_DESTINATIONS = "destinations"


@dataclass(frozen=True, kw_only=True)
class CampaignPlan:
    """How a campaign is made: small whatever its size."""

    #: Of each of its forks.
    fork: Plan
    fallback: Fallback | None
    #: Forks a batch, and batches in the queue at once.
    batch: int
    lanes: int
    #: Whether each fork is to be a snapshot of the source, a btrfs subvolume.
    snapshot: bool
    #: The home's parent, as the request names it.
    parent: str

    def to_data(self) -> dict[str, Any]:
        """As plain data for the journal."""
        return {**vars(self), "fork": self.fork.to_data()}

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> CampaignPlan:
        """From what `to_data` gave. Raises ForkError (Malformed) for anything else."""
        with validation.reading("the campaign's plan"):
            return cls(
                **{
                    **data,
                    "fork": Plan.from_data(data["fork"]),
                    "fallback": fallback_of(data["fallback"]),
                    "batch": validation.number(data["batch"], start=1),
                    "lanes": validation.number(data["lanes"], start=1),
                    "snapshot": validation.flag(data["snapshot"]),
                    "parent": validation.absolute_path(data["parent"]),
                }
            )


@dataclass(frozen=True)
class Campaign:
    """A planned campaign, open in this process, whose control directory is held."""

    staging: Staging
    spec: CampaignSpec
    plan: CampaignPlan
    #: When it was planned, in seconds since the epoch.
    planned_at: float

    def destinations(self, first: int, count: int) -> list[str]:
        """The destinations of `count` forks (fewer at the end) from the index `first` on."""
        return _read_destinations(self.staging, self.spec.aims.count, first, count)


def plan_campaign(ends: Endpoints, staging: Staging, spec: CampaignSpec, paths: Iterable[str], ticker: Ticker) -> None:
    """Plan the campaign; `staging` is held alone, and `ends` leads to the source and to the campaign's home.

    Raises ForkError (as `make_plan` does, and worker_lost), and OSError.
    """
    journal = staging.journal()
    if journal is not None and journal.tries >= MAX_TRIES:
        raise worker_lost(spec.source)
    journal = staging.begin(spec.to_data(), journal)
    try:
        # The walk makes directories, and the largest file is cloned to learn whether the filesystems can reflink:
        # in a tree that is thrown away.
        with open_work(ends, staging, spec.options, staging.make_tree(journal)) as work:
            cloner, report = Cloner(spec.options, {}, ticker.step), Report()
            plan = make_plan(work, _WHOLE, cloner, ticker, report)
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
    """Hold a planned campaign, shared or `alone`; None where there is none (any more). `home`: its first destination.

    Raises Held when others hold it for `wait` seconds, ForkError and OSError.
    """
    with (
        roots.open_parent(home) as parent,
        Staging.attach(parent.fd, campaign_id, wait, alone=alone) as staging,
    ):
        yield None if staging is None else campaign_in(staging)


def campaign_in(staging: Staging) -> Campaign | None:
    """The campaign whose control directory is held; None while it is not planned, or what was planned is damaged.

    Raises NotOurs (a ForkError), and OSError.
    """
    journal = staging.own_journal()
    if journal is None or not journal.is_campaign or journal.phase is not Phase.CLONING or journal.plan is None:
        return None
    try:
        spec, plan = CampaignSpec.from_data(journal.spec), CampaignPlan.from_data(journal.plan)
    except validation.Malformed as error:
        log.warning("the campaign %r is planned anew: %s", journal.job_id, error)
        return None
    return Campaign(staging, spec, plan, journal.planned_at)


def find_home(roots: Roots, paths: Iterable[str]) -> str:
    """The first destination whose parent can be opened. Raises the ForkError of the first where there is none."""
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
    """About how long one fork takes, in seconds. Reflinks of large files are reckoned by that of the largest one."""
    seconds = _FORK_SECONDS + plan.entries * _ENTRY_SECONDS
    probe = next(unpack_pages(report.close()), None)
    if probe is not None and probe["bytes"] >= _TELLING_BYTES:
        return seconds + probe["seconds"] * plan.bytes / probe["bytes"]
    if probe is not None and probe["method"] == "reflink":
        return seconds
    return seconds + plan.bytes * _BYTE_SECONDS


def _batch_size(spec: CampaignSpec, seconds: float) -> int:
    """Forks a batch: for two batches at once within `max_parallel`, and an even number of them if they are as good."""
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


# -- the list of destinations: the offset of each, and of the end; a checksum of each; then all of them

_OFFSET_BYTES, _CHECK_BYTES = 8, 4


def _write_destinations(staging: Staging, paths: Iterable[str]) -> None:
    names = [os.fsencode(path) for path in paths]
    offsets = array("Q", [0])
    for name in names:
        offsets.append(offsets[-1] + len(name))
    checks = array("I", map(_check, names, itertools.count()))
    staging.write_file(_DESTINATIONS, b"".join([offsets.tobytes(), checks.tobytes(), *names]))


def _read_destinations(staging: Staging, total: int, first: int, wanted: int) -> list[str]:
    """Some of the destinations. Raises ForkError (Malformed) for a list that `_write_destinations` did not write."""
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
                raise validation.Malformed(f"{wanted} paths from number {first} on have no place in it")
            names = os.pread(fd, length, begin + total * _CHECK_BYTES + at)
            paths = [names[start - at : end - at] for start, end in pairwise(offsets)]
            if list(map(_check, paths, itertools.count(first))) != checks.tolist():
                raise validation.Malformed(f"{wanted} paths from number {first} on are not those that were written")
            return list(map(_destination_of, paths))
    finally:
        os.close(fd)


def _check(path: bytes, index: int) -> int:
    """A checksum of one destination: a damaged path is a path too, and a fork would be published there."""
    return zlib.crc32(path, index & 0xFFFFFFFF)


def _destination_of(path: bytes) -> str:
    destination = os.fsdecode(path)
    with suppress(ForkError):
        if normal_path(destination, "destination") == destination:
            return destination
    raise validation.Malformed(f"{destination!r:.80} is no destination")
