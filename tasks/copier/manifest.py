"""The manifest on disk: the entries of the source, in blocks that any process can read from any offset.

A block is a small header, the directory's path, the entries' names and notes (with a NUL between, which no path
holds), and twelve columns of 64-bit numbers. It is written and read by whole columns: a manifest of a million entries
in about half a second, and no block is larger than `walk.BLOCK_ENTRIES` entries.
"""

from __future__ import annotations

import os
import struct
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any, BinaryIO, NamedTuple

from tasks.copier.walk import Block, Entry

#: Lengths in bytes of path, names, notes, numbers; count of entries.
_HEADER = struct.Struct("=IIIII")
#: An entry of its fields, without the check of their number that `Entry._make` would do a million times.
_make_entry: Callable[[Iterable[Any]], Entry] = partial(tuple.__new__, Entry)


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
        all_names, all_notes, *columns = zip(*block.entries, strict=True)
        names = os.fsencode("\0".join(all_names))
        notes = os.fsencode("\0".join(all_notes))
        numbers = _pack(list(chain.from_iterable(columns)))
        header = _HEADER.pack(len(path), len(names), len(notes), len(numbers), len(block.entries))
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
        *lengths, _ = _HEADER.unpack(os.pread(fd, _HEADER.size, offset))
        length = _HEADER.size + sum(lengths)
        yield Span(offset, length)
        offset += length


def _read_block(fd: int, offset: int) -> tuple[Block, int]:
    *lengths, count = _HEADER.unpack(os.pread(fd, _HEADER.size, offset))
    offset += _HEADER.size
    body = os.pread(fd, sum(lengths), offset)
    path, names, notes, packed = _split(body, lengths)
    numbers = _unpack(packed)
    columns = [numbers[at : at + count] for at in range(0, len(numbers), count)]
    fields = zip(os.fsdecode(names).split("\0"), os.fsdecode(notes).split("\0"), *columns, strict=True)
    return Block(os.fsdecode(path), list(map(_make_entry, fields))), offset + len(body)


def _split(body: bytes, lengths: list[int]) -> list[bytes]:
    parts, at = [], 0
    for length in lengths:
        parts.append(body[at : at + length])
        at += length
    return parts


def _pack(numbers: list[int]) -> bytes:
    """Numbers as an array of 64 bits each, or as text when one does not fit; the first byte tells which.

    Inodes of tmpfs and overlayfs use all 64 bits unsigned, and times are signed and may lie after the year 2262.
    """
    try:
        return b"q" + array("q", numbers).tobytes()
    except OverflowError:
        return b"t" + " ".join(map(str, numbers)).encode("ascii")


def _unpack(packed: bytes) -> Sequence[int]:
    if packed[:1] == b"t":
        return [int(number) for number in packed[1:].split()]
    numbers = array("q")
    numbers.frombytes(packed[1:])
    return numbers
