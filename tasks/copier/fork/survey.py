"""Walking the source: writes its entries to the manifest and makes its directories in the tree."""

from __future__ import annotations

import heapq
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from tasks.copier.errors import from_oserror
from tasks.copier.kernel.sparse import reports_holes
from tasks.copier.options import Limits
from tasks.copier.progress import Ticker
from tasks.copier.source import manifest
from tasks.copier.source.manifest import Kept, Span
from tasks.copier.source.selection import selection_of
from tasks.copier.source.walk import Block, Entry, Kind, Walk, join
from tasks.copier.staging.workspace import KeptManifests, Workspace

#: How many of the largest files are kept for the reflink probe.
LARGEST = 8
#: How many entries may be kept in memory instead of in the manifests on disk: about 1 MiB.
_MOST_KEPT = 2_000
#: Plain numbers, because they are compared with every entry, and reading an enum's member is slow.
_FILE, _SYMLINK = int(Kind.FILE), int(Kind.SYMLINK)


@dataclass
class Unit:
    """Consecutive blocks of the manifest that go into the same chunk."""

    offset: int
    length: int = 0  # bytes, or blocks if the manifest is kept in memory
    files: int = 0
    data: int = 0  # bytes
    #: The one large file, if the unit is one: its directory and entry.
    large: tuple[str, Entry] | None = None

    @property
    def span(self) -> Span:
        """The unit's part of the manifest."""
        return Span(self.offset, self.length)

    def move_to(self, spans: list[Span]) -> None:
        """Say where its blocks are now: on disk."""
        self.offset, self.length = spans[0].offset, sum(span.length for span in spans)

    def append(self, unit: Unit) -> None:
        """Add the unit that follows this one in the manifest."""
        self.length += unit.length
        self.files += unit.files
        self.data += unit.data


class Survey:
    """What the walk has found so far. `units` are those that are in no chunk yet; the planner removes them."""

    def __init__(self, work: Workspace, limits: Limits, opened: ExitStack) -> None:
        """`opened` closes the manifests."""
        self._work, self._limits, self._opened = work, limits, opened
        #: The manifests in memory, as long as they are kept there.
        self._kept: KeptManifests | None = work.kept or KeptManifests()
        self._files: Kept | manifest.Writer = self._kept.files
        self._closing: Kept | manifest.Writer = self._kept.closing
        self.units: list[Unit] = []
        self.entries = 0
        #: Files and symlinks; logical bytes; bytes of data, which a copy has to read.
        self.files = 0
        self.bytes = 0
        self.data = 0
        self._heap: list[tuple[int, str, Entry]] = []
        #: Size of the smallest of the largest files.
        self._least = -1
        #: Whether a large file may be copied in ranges. A lease must be held from the file's first byte to its last, so
        #: with `source_open: refuse` one process copies all of it.
        self._divides = work.options.source_open == "allow"
        #: Whether holes are skipped. If they are found by reading, a copy reads the whole file.
        self._skips_holes = reports_holes(work.ends.source_fd)

    def largest(self) -> list[tuple[str, Entry]]:
        """Paths and entries of the largest files, the largest first."""
        return [(path, entry) for _, path, entry in sorted(self._heap, reverse=True)]

    def write(self) -> None:
        """Write the manifests to disk from now on, and what was kept in memory. Raises OSError."""
        if self._kept is None:
            return
        kept, self._kept = self._kept, None
        self._files, spans = self._written(kept.files, closing=False)
        self._closing, _ = self._written(kept.closing, closing=True)
        for unit in self.units:
            unit.move_to(spans[unit.offset : unit.offset + unit.length])
        kept.files, kept.closing, kept.are_written = Kept(), Kept(), True

    def write_late(self) -> None:
        """Write the manifests after the walk, unless they are on disk. Raises ForkError."""
        try:
            with self._opened:
                self.write()
        except OSError as error:
            raise from_oserror(error, "writing the manifest", self._work.ends.destination) from None

    def _written(self, kept: Kept, *, closing: bool) -> tuple[manifest.Writer, list[Span]]:
        """Write one manifest. Also returns the places of its blocks."""
        fd = self._work.staging.manifest(closing=closing)
        writer = manifest.Writer(self._opened.enter_context(os.fdopen(fd, "wb")))
        return writer, [writer.append(block) for block in kept.blocks]

    def flush(self) -> None:
        """Pass what was written to the kernel, so that other processes can read it."""
        for writer in (self._files, self._closing):
            if isinstance(writer, manifest.Writer):
                writer.flush()

    def walk(self, ticker: Ticker) -> Iterator[None]:
        """Walk the source, and yield after each block of it. Raises ForkError as `Walk.blocks` does, and OSError."""
        for block in self._new_walk(ticker.poll).blocks():
            self._add(block)
            yield

    def refuse_unsupported(self, ticker: Ticker) -> None:
        """Walk the source ahead. Raises ForkError if it holds an entry that cannot be forked."""
        self._new_walk(ticker.poll).refuse_unsupported()

    def _new_walk(self, checkpoint: Callable[[], None]) -> Walk:
        options, ends = self._work.options, self._work.ends
        selection = selection_of(tuple(options.skip), tuple(options.exclude))
        return Walk(
            ends.source_fd,
            ends.source,
            selection,
            "hardlinks" in options.preserve,
            checkpoint,
            destination=ends.destination,
            parent=ends.parent_identity(),
        )

    def _add(self, block: Block) -> None:
        """Write one block to the manifests, make its directories, and count its entries."""
        small: list[Entry] = []
        others: list[Entry] = []
        size = data = 0
        for entry in block.entries:
            kind = entry.kind
            if kind == _FILE:
                size += entry.size
                if entry.size > self._least:
                    self._keep_large(block.path, entry)
                amount = entry.data if self._skips_holes else max(entry.data, entry.size)
                if amount > self._limits.chunk_bytes:
                    self._add_large(block.path, entry, amount)
                    continue
                data += amount
            elif kind != _SYMLINK:
                others.append(entry)
                continue
            small.append(entry)
        self.entries += len(block.entries)
        if self.entries > _MOST_KEPT:
            self.write()
        self.files += len(block.entries) - len(others)
        self.bytes += size
        if small:
            self._add_to_last(self._files.append(Block(block.path, small)), len(small), data)
        if others:
            self._closing.append(Block(block.path, others))
            self._work.make_directories(block.path, [entry.name for entry in others if entry.kind == Kind.DIRECTORY])

    def _add_large(self, directory: str, entry: Entry, amount: int) -> None:
        """Add one file with more data than a chunk may have: it gets a block and a unit of its own."""
        span = self._files.append(Block(directory, [entry]))
        self.units.append(Unit(*span, 1, amount, (directory, entry) if self._divides else None))
        self.data += amount

    def _add_to_last(self, span: Span, files: int, data: int) -> None:
        """Add a block to the previous unit while that is small: there may be 100,000 small directories."""
        self.data += data
        last = self.units[-1] if self.units else None
        if (
            last is None
            or last.large is not None
            or last.offset + last.length != span.offset
            or last.files + files > self._limits.chunk_files // 8
            or last.data + data > self._limits.chunk_bytes // 8
        ):
            last = Unit(span.offset)
            self.units.append(last)
        last.length += span.length
        last.files += files
        last.data += data

    def _keep_large(self, directory: str, entry: Entry) -> None:
        heapq.heappush(self._heap, (entry.size, join(directory, entry.name), entry))
        if len(self._heap) > LARGEST:
            heapq.heappop(self._heap)
            self._least = self._heap[0][0]


@contextmanager
def open_survey(work: Workspace, limits: Limits) -> Iterator[Survey]:
    """A survey that writes the manifests of `work`, or keeps them; they are complete when the context ends."""
    with ExitStack() as opened:
        survey = Survey(work, limits, opened)
        if work.kept is None:
            survey.write()
        yield survey
        if survey.files > limits.inline_files:
            survey.write()  # it is divided into chunks, for other processes
