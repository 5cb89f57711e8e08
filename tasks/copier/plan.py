"""Planning a fork: walk the source, make its directories, learn whether it can be reflinked, and cut it into chunks."""

from __future__ import annotations

import heapq
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from tasks.copier import manifest
from tasks.copier.clone import Cloner, ReflinkRefused
from tasks.copier.errors import ForkError, from_oserror
from tasks.copier.manifest import Span
from tasks.copier.options import Limits
from tasks.copier.progress import Ticker
from tasks.copier.reflink import Answer, meaning
from tasks.copier.report import Report, failed
from tasks.copier.selection import Selection
from tasks.copier.walk import Block, Entry, Kind, Walk, entry_of, join
from tasks.copier.work import Work

#: How many of the largest files are asked for a reflink until one answers for the pair of filesystems.
_PROBES = 8
#: Ranges of a file begin at multiples of so many bytes, so that no two of them share a block.
_RANGE_ALIGNMENT = 1 << 20


@dataclass(frozen=True, slots=True)
class Chunk:
    """One task's part: the files in a span of the manifest, or the bytes [start, end) of the one file in it."""

    kind: Literal["files", "range"]
    offset: int
    length: int
    start: int = 0
    end: int = 0

    @property
    def span(self) -> Span:
        """Where the chunk's entries lie in the manifest."""
        return Span(self.offset, self.length)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be done, small whatever the size of the source; the entries lie in the manifest."""

    chunks: list[Chunk]
    #: Whether all of it is so little that the planner does it at once.
    inline: bool
    #: Number of FileResults that the fork will have, and logical bytes.
    entries: int
    bytes: int
    #: The source directory itself.
    top: Entry
    #: Relative path of the file that the planner cloned when it asked for a reflink, if one was.
    cloned: str | None
    #: Pairs of devices that refused a reflink: (source, destination, errno).
    refused: list[tuple[int, int, int]]

    def to_data(self) -> dict[str, Any]:
        """As plain data for the journal."""
        return asdict(self)

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> Plan:
        """From what `to_data` gave."""
        return cls(
            **{
                **data,
                "chunks": [Chunk(**chunk) for chunk in data["chunks"]],
                "top": Entry(*data["top"]),
                "refused": [(src, dst, number) for src, dst, number in data["refused"]],
            }
        )


@dataclass
class _Unit:
    """A run of blocks in the manifest that stays together."""

    offset: int
    length: int = 0
    files: int = 0
    data: int = 0  # bytes
    #: The one large file, if the unit is one: its relative path and size.
    large: tuple[str, Entry] | None = None


@dataclass
class _Survey:
    """What the walk found, beside the manifest."""

    units: list[_Unit] = field(default_factory=list)
    entries: int = 0
    bytes: int = 0
    #: (size, path, entry) of the largest files: a heap.
    largest: list[tuple[int, str, Entry]] = field(default_factory=list)

    @property
    def files(self) -> int:
        return sum(unit.files for unit in self.units)

    @property
    def data(self) -> int:
        return sum(unit.data for unit in self.units)


def make_plan(work: Work, limits: Limits, cloner: Cloner, ticker: Ticker, report: Report) -> Plan:
    """Plan the fork; what was cloned while asking for a reflink goes into `report`.

    Raises ForkError: unsupported_file_type, permission_denied, source_changed, reflink_unsupported, no_space …
    """
    top = entry_of("", "", Kind.DIRECTORY, os.fstat(work.ends.source_fd))  # before the walk: a later change shows
    survey = _survey(work, limits, ticker)
    ticker.enter("copy", survey.entries, survey.bytes)
    cloned, refused_paths = _probe(work, cloner, survey, ticker, report)
    reflinks = cloned is not None
    inline = survey.files <= limits.inline_files and (reflinks or survey.data <= limits.inline_bytes)
    if inline:
        end = sum(unit.length for unit in survey.units)
        chunks = [Chunk("files", 0, end)] if end else []
    else:
        chunks = list(_cut(survey.units, limits, reflinks, refused_paths))
        _create_ranged(work, cloner, survey.units, chunks)
    return Plan(
        chunks=chunks,
        inline=inline,
        entries=survey.entries,
        bytes=survey.bytes,
        top=top,
        cloned=cloned,
        refused=[(src, dst, number) for (src, dst), number in cloner.reflinker.refused.items()],
    )


# -- the walk


def _survey(work: Work, limits: Limits, ticker: Ticker) -> _Survey:
    survey = _Survey()
    options = work.options
    walk = Walk(
        work.ends.source_fd,
        work.ends.source,
        Selection(options.skip, options.exclude),
        "hardlinks" in options.preserve,
        ticker.look,
    )
    files_fd = work.staging.manifest()
    closing_fd = work.staging.manifest(closing=True)
    with open(files_fd, "wb") as files_file, open(closing_fd, "wb") as closing_file:
        files, closing = manifest.Writer(files_file), manifest.Writer(closing_file)
        try:
            for block in walk.blocks():
                _take_in(work, block, survey, files, closing, limits)
            files.flush()
            closing.flush()
        except OSError as error:
            raise from_oserror(error, "writing the manifest", work.ends.destination) from None
    return survey


def _take_in(
    work: Work, block: Block, survey: _Survey, files: manifest.Writer, closing: manifest.Writer, limits: Limits
) -> None:
    """Write one block of the walk to the manifests, make its directories, and count."""
    small: list[Entry] = []
    others: list[Entry] = []
    directories: list[str] = []
    survey.entries += len(block.entries)
    for entry in block.entries:
        if entry.kind == Kind.FILE:
            survey.bytes += entry.size
            _keep_largest(survey.largest, join(block.path, entry.name), entry)
            if entry.data > limits.chunk_bytes:
                large = _Unit(*files.append(Block(block.path, [entry])), 1, entry.data, (block.path, entry))
                survey.units.append(large)
            else:
                small.append(entry)
        elif entry.kind == Kind.SYMLINK:
            small.append(entry)
        else:
            others.append(entry)
            if entry.kind == Kind.DIRECTORY:
                directories.append(entry.name)
    if small:
        span = files.append(Block(block.path, small))
        _add_to_last(survey.units, span, len(small), sum(entry.data for entry in small), limits)
    if others:
        closing.append(Block(block.path, others))
    if directories:
        _make_directories(work, block.path, directories)


def _add_to_last(units: list[_Unit], span: Span, files: int, data: int, limits: Limits) -> None:
    """Join a block to the unit before it while that is small: a tree may have a hundred thousand small directories."""
    last = units[-1] if units else None
    fits = (
        last is not None
        and last.large is None
        and last.files + files <= limits.chunk_files // 8
        and last.data + data <= limits.chunk_bytes // 8
    )
    if last is None or not fits:
        last = _Unit(span.offset)
        units.append(last)
    last.length += span.length
    last.files += files
    last.data += data


def _keep_largest(largest: list[tuple[int, str, Entry]], path: str, entry: Entry) -> None:
    if len(largest) < _PROBES:
        heapq.heappush(largest, (entry.size, path, entry))
    elif entry.size > largest[0][0]:
        heapq.heapreplace(largest, (entry.size, path, entry))


def _make_directories(work: Work, path: str, names: list[str]) -> None:
    """Make directories in the tree, for us alone until the fork is closed."""
    fd = work.open_tree(path)
    try:
        for name in names:
            os.mkdir(name, 0o700, dir_fd=fd)
    except OSError as error:
        raise from_oserror(error, "making a directory", join(work.ends.destination, path)) from None
    finally:
        os.close(fd)


# -- the question


def _probe(
    work: Work, cloner: Cloner, survey: _Survey, ticker: Ticker, report: Report
) -> tuple[str | None, frozenset[str]]:
    """Reflink the largest file; its answer is the plan's.

    A file may refuse for itself (NOCOW on btrfs); then the next largest is asked. Returns the path of the file cloned
    (None where nothing can be reflinked) and those that refused for themselves.
    """
    refused: set[str] = set()
    if work.options.reflink == "never":
        return None, frozenset()
    for _, path, entry in sorted(survey.largest, reverse=True):
        directory = path.rpartition("/")[0]
        with work.place(directory) as place:
            try:
                report.add(cloner.file(place, entry, may_copy=False))
            except ReflinkRefused as refusal:
                if meaning(refusal.refusal.errno) is Answer.PAIR_CANNOT and cloner.reflinker.refused:
                    break
                refused.add(path)
                continue
            except ForkError as error:
                report.add(failed(path, entry, error))
                raise
        ticker(1, entry.size)
        return path, frozenset(refused)
    return None, frozenset(refused)


# -- the cut


def _cut(units: list[_Unit], limits: Limits, reflinks: bool, refused: frozenset[str]) -> Iterator[Chunk]:
    """Cut the work into chunks of about equal time: by count of files for reflinks, by bytes too for copies."""
    files_each = _share(sum(unit.files for unit in units), limits.chunk_files, limits.max_chunks)
    data_each = _share(sum(unit.data for unit in units), limits.chunk_bytes, limits.max_chunks)
    run: _Unit | None = None
    for unit in units:
        if unit.large is not None and _is_copied(unit.large, reflinks, refused):
            yield from _ranges(unit, unit.large[1], data_each)
            continue
        if run is not None and (
            run.offset + run.length != unit.offset
            or run.files + unit.files // 2 > files_each
            or (not reflinks and run.data + unit.data // 2 > data_each)
        ):
            yield Chunk("files", run.offset, run.length)
            run = None
        if run is None:
            run = _Unit(unit.offset)
        run.length += unit.length
        run.files += unit.files
        run.data += unit.data
    if run is not None:
        yield Chunk("files", run.offset, run.length)


def _share(amount: int, wanted: int, most: int) -> int:
    """The size of one chunk of `amount`: about `wanted`, more where that would make more than `most` chunks.

    An even number of chunks, since the last of an odd number leaves every other process of two or four idle.
    """
    count = -(-amount // (2 * wanted)) * 2
    return max(1, -(-amount // max(1, min(count, most))))


def _is_copied(large: tuple[str, Entry], reflinks: bool, refused: frozenset[str]) -> bool:
    directory, entry = large
    return not reflinks or join(directory, entry.name) in refused


def _ranges(unit: _Unit, entry: Entry, data_each: int) -> Iterator[Chunk]:
    """Ranges of one large file, each with about `data_each` bytes of data if that is spread evenly."""
    count = max(1, round(unit.data / data_each))
    length = -(-entry.size // count)
    length = -(-length // _RANGE_ALIGNMENT) * _RANGE_ALIGNMENT
    for start in range(0, entry.size, length):
        yield Chunk("range", unit.offset, unit.length, start, min(start + length, entry.size))


def _create_ranged(work: Work, cloner: Cloner, units: Iterable[_Unit], chunks: Iterable[Chunk]) -> None:
    ranged = {chunk.offset for chunk in chunks if chunk.kind == "range"}
    for unit in units:
        if unit.large is not None and unit.offset in ranged:
            directory, entry = unit.large
            with work.place(directory) as place:
                cloner.create_for_ranges(place, entry)
