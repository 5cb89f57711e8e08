"""Planning a fork: walk the source, find out whether it can be reflinked, and cut the work into chunks."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from tasks.copier import validation
from tasks.copier.clone.file import Cloner
from tasks.copier.errors import from_oserror
from tasks.copier.fork.reflink_probe import Probed, probe
from tasks.copier.fork.survey import LARGEST, Survey, Unit, open_survey
from tasks.copier.options import Limits
from tasks.copier.progress import Ticker
from tasks.copier.report import Report
from tasks.copier.source.manifest import Span
from tasks.copier.source.walk import Entry, Kind, entry_of, join
from tasks.copier.space.forecast import Forecast
from tasks.copier.space.room import Room
from tasks.copier.staging.workspace import Workspace

#: One of this many chunks may be cut during the walk; meanwhile their size doubles this many times.
_EARLY_SHARE = 4
_DOUBLINGS = 6
#: Ranges of a file begin at multiples of this many bytes, so that no two ranges share a block.
_RANGE_ALIGNMENT = 1 << 20


class Chunk(NamedTuple):
    """The work of one task: the files in a span of the manifest, or the bytes [start, end) of the one file in it."""

    kind: Literal["files", "range"]
    offset: int
    length: int
    start: int = 0
    end: int = 0

    @property
    def span(self) -> Span:
        """The part of the manifest that lists the chunk's entries."""
        return Span(self.offset, self.length)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The work of one fork. Its size is bounded: the entries themselves are in the manifest."""

    chunks: list[Chunk]
    #: Whether the work is so small that the planner does it at once.
    inline: bool
    #: Number of FileResults that the fork will have, and its logical bytes.
    entries: int
    bytes: int
    #: The source directory itself.
    top: Entry
    #: Relative paths of the files that the planner cloned to find out whether a reflink works.
    cloned: tuple[str, ...]
    #: Pairs of devices that refused a reflink: (source, destination, errno).
    refused: list[tuple[int, int, int]]

    def cloned_in(self, directory: str) -> set[str]:
        """The names of the files in `directory` that the planner cloned."""
        paths = (path.rpartition("/") for path in self.cloned)
        return {name for parent, _, name in paths if parent == directory}

    def to_data(self) -> dict[str, Any]:
        """Plain data for the journal."""
        return vars(self)

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> Plan:
        """The plan that `to_data` returned. Raises ForkError (Malformed) for anything else."""
        with validation.reading("the plan"):
            return cls(
                **{
                    **data,
                    "chunks": validation.list_of(data["chunks"], _chunk_of, _MOST_CHUNKS),
                    "inline": validation.boolean(data["inline"]),
                    "entries": validation.integer(data["entries"]),
                    "bytes": validation.integer(data["bytes"], validation.SUM),
                    "top": _top_of(data["top"]),
                    "cloned": tuple(validation.list_of(data["cloned"], validation.relative_path, LARGEST)),
                    "refused": validation.list_of(data["refused"], _refused_of, _MOST_REFUSED),
                }
            )


#: Most chunks of a plan (the setting allows 10,000, and more are cut during the walk), and most refused pairs.
_MOST_CHUNKS, _MOST_REFUSED = 100_000, 10_000


def _chunk_of(value: Any) -> Chunk:
    kind, *numbers = value
    chunk = Chunk(validation.one_of(kind, ("files", "range")), *map(validation.integer, numbers))
    if chunk.kind == "range" and not chunk.start < chunk.end:
        raise validation.Malformed(f"{chunk} is not a range: its start is not before its end")
    return chunk


def _top_of(value: Any) -> Entry:
    """The source directory itself."""
    name, note, kind, *numbers, atime, mtime, ctime = value
    if (name, note, kind) != ("", "", Kind.DIRECTORY):
        raise validation.Malformed(f"{(name, note, kind)!r:.80} is not the source directory")
    for number in numbers:
        validation.integer(number, validation.U64)
    for time in (atime, mtime, ctime):
        validation.integer(time, validation.NANOSECONDS, -validation.NANOSECONDS)
    return Entry(*value)


def _refused_of(value: Any) -> tuple[int, int, int]:
    source, destination, errno = value
    return (
        validation.integer(source, validation.U64),
        validation.integer(destination, validation.U64),
        validation.errno_number(errno),
    )


class EarlyWorkers(Protocol):
    """Processes that do chunks while the source is still walked."""

    def take(self, chunk: Chunk, number: int, plan: Plan) -> None:
        """Do `chunk`, which is chunk `number`. `plan` is the plan so far: its sums are not final."""

    def finish_early(self) -> Iterable[int]:
        """The plan is complete. Returns the numbers of the chunks that are done; other processes may do the others."""

    def stop(self) -> None:
        """Stop all work. When this returns, none of the processes runs."""


def make_plan(
    work: Workspace,
    limits: Limits,
    cloner: Cloner,
    ticker: Ticker,
    report: Report,
    room: Room,
    early: EarlyWorkers | None = None,
) -> Plan:
    """Plan the fork. The files that were cloned to find out whether a reflink works are added to `report`.

    What will be copied is compared with the budget of the request, and reserved in `room`. With `early`, chunks of a
    large source are begun during the walk; without, all are cut at its end. Raises ForkError: unsupported_file_type,
    permission_denied, source_changed, reflink_unsupported, no_space, copy_budget_exceeded …
    """
    top = entry_of("", "", Kind.DIRECTORY, os.fstat(work.ends.source_fd))  # before the walk: later changes are noticed
    chunks: list[Chunk] = []
    probed: Probed | None = None
    if work.options.max_copied_bytes is not None:
        early = None  # nothing is copied before all that will be is known

    def plan(cloned: tuple[str, ...], inline: bool) -> Plan:
        return Plan(
            chunks=chunks,
            inline=inline,
            entries=survey.entries,
            bytes=survey.bytes,
            top=top,
            cloned=cloned,
            refused=[(src, dst, number) for (src, dst), number in cloner.reflinker.refused.items()],
        )

    try:
        with open_survey(work, limits) as survey:
            for _ in survey.walk(ticker):
                ticker.enter("plan", survey.entries, survey.bytes)  # the sums so far
                if early is None or survey.files <= limits.inline_files:
                    continue
                if probed is None:
                    probed = probe(work, cloner, survey.largest(), ticker, report)
                    if not probed.can_reflink:
                        survey.refuse_unsupported(ticker)  # before anything is copied
                for chunk in _cut_early(survey, limits, len(chunks), reflinks=probed.can_reflink):
                    chunks.append(chunk)
                    if probed.can_reflink or room.take(survey.data):
                        early.take(chunk, len(chunks) - 1, plan(probed.cloned, inline=False))
    except OSError as error:
        raise from_oserror(error, "writing the manifest", work.ends.destination) from None
    ticker.enter("copy", survey.entries, survey.bytes)
    if probed is None:
        probed = probe(work, cloner, survey.largest(), ticker, report)
    _check_copies(work, cloner, survey, probed, top, room, ticker)
    if survey.files <= limits.inline_files and (probed.can_reflink or survey.data <= limits.inline_bytes):
        if survey.units:
            chunks.append(Chunk("files", 0, sum(unit.length for unit in survey.units)))
        return plan(probed.cloned, inline=True)
    survey.write_late()
    chunks += _cut(survey.units, limits, probed, limits.max_chunks - len(chunks))
    _create_ranged(work, cloner, survey.units, chunks)
    return plan(probed.cloned, inline=False)


def _check_copies(
    work: Workspace, cloner: Cloner, survey: Survey, probed: Probed, top: Entry, room: Room, ticker: Ticker
) -> None:
    """Compare what will be copied, as far as it is known, with the budget, and reserve it in `room`.

    Raises ForkError: copy_budget_exceeded, no_space.
    """
    forecast, most = Forecast(work, cloner, probed.cloned, probed.refused), work.options.max_copied_bytes
    if most is not None:
        _refuse_over_budget(forecast, top, most, ticker)
    refused = sum(entry.data for path, entry in survey.largest() if path in probed.refused)
    room.require(
        refused if probed.can_reflink else survey.data,
        lambda: sum(forecast.data_of(file).bytes for file in forecast.copied(top.dev, ticker.poll)),
    )


def _refuse_over_budget(forecast: Forecast, top: Entry, most: int, ticker: Ticker) -> None:
    """Raise ForkError copy_budget_exceeded if the fork will copy more than `most` bytes."""
    total = 0
    for file in forecast.copied(top.dev, ticker.poll):
        data = forecast.data_of(file)
        total += data.bytes if data.exact else 0
        if total > most:
            raise forecast.exceeds(most, file)


# -- cutting into chunks


def _cut_early(survey: Survey, limits: Limits, cut: int, *, reflinks: bool) -> Iterator[Chunk]:
    """Take a chunk from the survey's units during the walk, if there are enough; `cut` chunks were taken before.

    The chunks grow with their number, because the size of the source is not known yet. Most chunks are left for the
    end of the walk. So is a large file that must be copied: it is cut into ranges.
    """
    survey.write()  # the places of units are those on disk from now on
    budget = limits.max_chunks // _EARLY_SHARE
    if cut >= budget:
        return
    doublings = cut * _DOUBLINGS // budget
    most_files, most_data = limits.chunk_files << doublings, limits.chunk_bytes << doublings
    first, run = 0, Unit(0)
    for number, unit in enumerate(survey.units[:-1]):  # the last one may still grow
        if unit.large is not None and not reflinks:
            continue
        if run.offset + run.length != unit.offset:
            first, run = number, Unit(unit.offset)
        run.append(unit)
        if run.files >= most_files or (run.data >= most_data and not reflinks):
            survey.flush()
            del survey.units[first : number + 1]
            yield Chunk("files", run.offset, run.length)
            return


def _cut(units: list[Unit], limits: Limits, probed: Probed, most: int) -> list[Chunk]:
    """Cut the work into at most `most` chunks of about equal time: by number of files, and for copies by bytes too."""
    files, data = sum(unit.files for unit in units), sum(unit.data for unit in units)
    # The limit holds from the start, or the chunks of a sparse file of some EiB would fill the memory.
    files_each = _share(files, max(limits.chunk_files, files // max(1, most)))
    data_each = _share(data, max(limits.chunk_bytes, data // max(1, most)))
    while True:
        chunks = list(_cut_evenly(units, files_each, data_each, probed))
        if len(chunks) <= most:
            # Ranges of different files side by side: those of one file wait for each other's writes (inode lock).
            return sorted(chunks, key=lambda chunk: (chunk.kind == "files", chunk.start))
        files_each, data_each = 2 * files_each, 2 * data_each


def _share(amount: int, wanted: int) -> int:
    """The size of one chunk of `amount`: about `wanted`, so that the number of chunks is even.

    With an odd number, one of two processes is idle during the last chunk.
    """
    return max(1, -(-amount // (2 * _parts(amount, 2 * wanted))))


def _parts(amount: int, wanted: int) -> int:
    """How many parts of about `wanted` there are in `amount`; a small remainder makes no further part."""
    return max(1, math.ceil(amount / wanted - 0.1))


def _cut_evenly(units: list[Unit], files_each: int, data_each: int, probed: Probed) -> Iterator[Chunk]:
    reflinks = probed.can_reflink
    run: Unit | None = None
    for unit in units:
        ranges = _ranges(unit, data_each, probed)
        full = run is not None and (
            run.files + unit.files // 2 > files_each or (not reflinks and run.data + unit.data // 2 > data_each)
        )
        if run is not None and (full or ranges or run.offset + run.length != unit.offset):
            yield Chunk("files", run.offset, run.length)
            run = None
        if ranges:
            yield from ranges
            continue
        if run is None:
            run = Unit(unit.offset)
        run.append(unit)
    if run is not None:
        yield Chunk("files", run.offset, run.length)


def _ranges(unit: Unit, data_each: int, probed: Probed) -> list[Chunk]:
    """Ranges of one large file, each with about `data_each` bytes of data if the data is spread evenly.

    Empty if the file is small enough for one chunk, or is to be reflinked.
    """
    if unit.large is None:
        return []
    directory, entry = unit.large
    if probed.can_reflink and join(directory, entry.name) not in probed.refused:
        return []
    length = -(-entry.size // _parts(unit.data, data_each))
    length = -(-length // _RANGE_ALIGNMENT) * _RANGE_ALIGNMENT
    if length >= entry.size:
        return []
    starts = range(0, entry.size, length)
    return [Chunk("range", *unit.span, start, min(start + length, entry.size)) for start in starts]


def _create_ranged(work: Workspace, cloner: Cloner, units: Iterable[Unit], chunks: Iterable[Chunk]) -> None:
    ranged = {chunk.offset for chunk in chunks if chunk.kind == "range"}
    for unit in units:
        if unit.large is not None and unit.offset in ranged:
            directory, entry = unit.large
            with work.place(directory) as place:
                cloner.create_for_ranges(place, entry)
