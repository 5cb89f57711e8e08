"""The manifest on disk: the entries of the source, in blocks that any process can read from any offset.

A block is a small header, the directory's path, the entries' names and notes (each closed by a NUL, which no path
holds), and eleven 64-bit numbers an entry. Text and numbers are written by whole arrays: a manifest of a million
entries is written and read in about a second, and no block is larger than `walk.BLOCK_ENTRIES` entries.
"""

from __future__ import annotations

import os
import struct
from array import array
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from tasks.copier.walk import Block, Entry

#: Lengths in bytes of path, names, notes; count of entries.
_HEADER = struct.Struct("=IIII")
#: kind and all after it.
_NUMBERS = len(Entry._fields) - 2


class Span(NamedTuple):
    """Where one block, or a run of them, lies in the manifest: offset and length in bytes."""

    offset: int
    length: int


class Writer:
    """Appends blocks to a manifest file; `flush` makes them readable for others."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._offset = 0

    def append(self, block: Block) -> Span:
        """Write `block`; returns where it lies."""
        path = os.fsencode(block.path)
        names = os.fsencode("".join([entry.name + "\0" for entry in block.entries]))
        notes = os.fsencode("".join([entry.note + "\0" for entry in block.entries]))
        numbers = array("q", [number for entry in block.entries for number in entry[2:]]).tobytes()
        header = _HEADER.pack(len(path), len(names), len(notes), len(block.entries))
        self._file.write(b"".join((header, path, names, notes, numbers)))
        span = Span(self._offset, len(header) + len(path) + len(names) + len(notes) + len(numbers))
        self._offset += span.length
        return span

    def flush(self) -> None:
        """Hand what was appended to the kernel."""
        self._file.flush()


def read(fd: int, span: Span) -> Iterator[Block]:
    """Yield the blocks that lie in `span` of the manifest file `fd`."""
    offset, end = span.offset, span.offset + span.length
    while offset < end:
        block, offset = _read_block(fd, offset)
        yield block


def whole(fd: int) -> Span:
    """The span of all blocks in the manifest file `fd`."""
    return Span(0, os.fstat(fd).st_size)


def spans(fd: int) -> Iterator[Span]:
    """Where each block of the manifest file `fd` lies, in order."""
    offset, end = whole(fd)
    while offset < end:
        length = _HEADER.size + _body_length(*_HEADER.unpack(os.pread(fd, _HEADER.size, offset)))
        yield Span(offset, length)
        offset += length


def _body_length(path: int, names: int, notes: int, count: int) -> int:
    return path + names + notes + count * _NUMBERS * 8


def _read_block(fd: int, offset: int) -> tuple[Block, int]:
    path_length, names_length, notes_length, count = _HEADER.unpack(os.pread(fd, _HEADER.size, offset))
    offset += _HEADER.size
    length = _body_length(path_length, names_length, notes_length, count)
    body = os.pread(fd, length, offset)
    names_at = path_length
    notes_at = names_at + names_length
    numbers_at = notes_at + notes_length
    names = os.fsdecode(body[names_at:notes_at]).split("\0")
    notes = os.fsdecode(body[notes_at:numbers_at]).split("\0")
    numbers = array("q")
    numbers.frombytes(body[numbers_at:])
    entries = [Entry(names[n], notes[n], *numbers[n * _NUMBERS : (n + 1) * _NUMBERS]) for n in range(count)]
    return Block(os.fsdecode(body[:path_length]), entries), offset + length
