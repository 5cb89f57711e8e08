"""The Estimate of the contract: what a fork would do, found out in a staging directory that is removed again."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Literal, TypedDict, final

from tasks.copier.clone.file import Cloner
from tasks.copier.endpoints import Endpoints, open_endpoints
from tasks.copier.errors import Code, ForkError, from_oserror
from tasks.copier.estimate import duration
from tasks.copier.estimate.counts import Counts, count, count_names
from tasks.copier.estimate.duration import Range
from tasks.copier.estimate.samples import measure
from tasks.copier.estimate.surprises import Room, Warning, fits, surprises
from tasks.copier.fork.reflink_probe import probe
from tasks.copier.fork.snapshot import snapshot_tree
from tasks.copier.fork.survey import open_survey
from tasks.copier.fork_spec import ForkSpec
from tasks.copier.kernel import syscalls
from tasks.copier.kernel.free_space import filesystem_id, free_bytes, free_inodes, may_compress
from tasks.copier.options import Limits, Options
from tasks.copier.progress import Poll, Ticker
from tasks.copier.report import Report
from tasks.copier.roots import Roots
from tasks.copier.source.selection import Selection
from tasks.copier.source.walk import Kind, Walk
from tasks.copier.space.forecast import Forecast
from tasks.copier.space.reservation import job_of, reserved_by_others, reserving
from tasks.copier.staging.control_directory import LOCK_WAIT, Held
from tasks.copier.staging.journal import Journal
from tasks.copier.staging.publishing import require_noreplace
from tasks.copier.staging.staging import Staging
from tasks.copier.staging.workspace import Workspace, open_work

#: In a smaller source all files are opened.
_FEW_FILES = 2_000

Method = Literal["snapshot", "reflink", "copy", "mixed"]


class EstimatedBytes(TypedDict):
    """Sizes in bytes: of all files, of their allocated blocks, and of what will be copied."""

    logical: int
    allocated: int
    to_copy: int


class EstimatedSeconds(TypedDict):
    """How long the fork will take, from its start to its publication; see `duration`."""

    low: float
    high: float


@final
class Estimate(TypedDict):
    """What a fork would do and cost; the contract's Estimate."""

    source: str
    destination: str
    method: Method
    #: Why files are copied; None if none is.
    reason: str | None
    #: Entries of the source, those that are left out included, and regular files.
    entries: int
    files: int
    bytes: EstimatedBytes
    #: Extents of all files. 0 for a snapshot, which does not depend on them.
    extents: int
    #: Free bytes of the destination's filesystem; None if it reports none.
    free_bytes: int | None
    #: Whether the free space, less what other forks of this host will take, and the free inodes are enough.
    fits: bool
    seconds: EstimatedSeconds
    warnings: list[Warning]


def estimate(spec: ForkSpec, roots: Roots, limits: Limits, poll: Poll) -> Estimate:
    """Estimate a fork. Nothing of it is left. Raises the ForkError with which the fork would fail before it copies.

    `poll` is called about four times a second and raises ForkError to cancel.
    """
    try:
        with open_endpoints(roots, spec.source, spec.destination) as ends:
            ends.refuse_existing()
            with Staging.claim(ends.parent_fd, spec.fork_id, LOCK_WAIT) as staging:
                return _in_staging(ends, staging, spec, limits, Ticker(poll))
    except Held:
        raise ForkError(Code.IO_ERROR, "another process makes an estimate with this id", spec.destination) from None
    except OSError as error:
        raise from_oserror(error, "working in the staging directory", spec.destination) from None


def _in_staging(ends: Endpoints, staging: Staging, spec: ForkSpec, limits: Limits, ticker: Ticker) -> Estimate:
    journal: Journal | None = None
    options = replace(spec.options, verify="none")
    try:
        journal = staging.begin(spec.to_data(), None)
        require_noreplace(staging.fd, spec.destination)
        with open_work(ends, staging, options, staging.make_tree(journal)) as work:
            room = _room(work)
            snapshot = snapshot_tree(work, staging, staging.tree_name(journal), ticker)
            if snapshot is not None:
                os.close(snapshot.fd)
                return _of_snapshot(spec, room, *_walk(ends, options, ticker))
            return _of_files(spec, work, room, limits, ticker)
    finally:
        if journal is not None:
            staging.discard_tree(journal)
        staging.remove()


def _room(work: Workspace) -> Room:
    fd = work.tree_fd
    with reserving():
        others = reserved_by_others(filesystem_id(fd), job_of(work.staging.fd))
    return {"free": free_bytes(fd), "others": others, "inodes": free_inodes(fd), "compresses": may_compress(fd)}


# -- by a snapshot


def _walk(ends: Endpoints, options: Options, ticker: Ticker) -> tuple[Counts, int]:
    """Count the source without opening its files. Also returns the number of its entries."""
    counts, entries = Counts(), 0
    walk = Walk(ends.source_fd, ends.source, Selection(options.skip, options.exclude), True, ticker.poll)
    for block in walk.blocks():
        entries += len(block.entries)
        for entry in block.entries:
            if entry.kind == Kind.FILE:
                counts.files += 1
                counts.logical += entry.size
                counts.allocated += entry.data
    return counts, entries


def _of_snapshot(spec: ForkSpec, room: Room, counts: Counts, entries: int) -> Estimate:
    return _estimate(spec, "snapshot", None, counts, entries, room, duration.of_snapshot(entries))


# -- by files


def _of_files(spec: ForkSpec, work: Workspace, room: Room, limits: Limits, ticker: Ticker) -> Estimate:
    top = os.fstat(work.ends.source_fd)
    with open_survey(work, limits) as survey:
        for _ in survey.walk(ticker):
            ticker.enter("plan", survey.entries, survey.bytes)
    cloner, report = Cloner(work.options, {}, ticker.step), Report()
    probed = probe(work, cloner, survey.largest(), ticker, report)
    forecast = Forecast(work, cloner, probed.cloned, probed.refused, is_guess=True)
    counts = count(forecast, top.st_dev, ticker.poll, opens_all=survey.files <= _FEW_FILES)
    on_tmpfs = syscalls.filesystem_type(work.tree_fd) == syscalls.TMPFS
    count_names(counts, work.blocks(top.st_dev, closing=True), on_tmpfs=on_tmpfs)
    reason = None
    if counts.copied:
        reason = cloner.fallback["reason"] if cloner.fallback is not None else _REASONS[work.options.reflink]
    measured = measure(work, cloner, probed, report, counts.largest_copied)
    seconds = duration.of_files(survey.entries, counts.reflinked_extents, counts.to_copy, measured)
    method: Method = "reflink" if not counts.copied else "mixed" if counts.reflinked else "copy"
    return _estimate(spec, method, reason, counts, survey.entries, room, seconds)


#: Why files are copied for which no reflink was tried.
_REASONS = {"never": "reflink=never", "auto": "NOCOW files on btrfs cannot be reflinked here", "always": None}


# -- both


def _estimate(
    spec: ForkSpec, method: Method, reason: str | None, counts: Counts, entries: int, room: Room, seconds: Range
) -> Estimate:
    return {
        "source": spec.source,
        "destination": spec.destination,
        "method": method,
        "reason": reason,
        "entries": entries,
        "files": counts.files,
        "bytes": {"logical": counts.logical, "allocated": counts.allocated, "to_copy": counts.to_copy},
        "extents": counts.extents,
        "free_bytes": room["free"],
        "fits": fits(counts, entries, room),
        "seconds": {"low": round(seconds.low, 6), "high": round(seconds.high, 6)},
        "warnings": surprises(counts, entries, reason, spec.options, room),
    }
