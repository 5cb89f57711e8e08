"""The manifest on disk: the entries of the source, in blocks that any process can read from any offset.

A block is a small header, the directory's path, the entries' names and notes (with a NUL between, which no path
holds), twelve columns of 64-bit numbers, and a checksum. It is written and read by whole columns: a manifest of a
million entries in about half a second, and no block is larger than `walk.BLOCK_ENTRIES` entries.
"""

from __future__ import annotations

import os
import struct
import sys
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any, BinaryIO, NamedTuple

from tasks.copier.source.walk import BLOCK_ENTRIES, Block, Entry, Kind
from tasks.copier.validation import NANOSECONDS, S63, U32, U64, Malformed, number, reading, relative_path

#: Lengths in bytes of path, names, notes, numbers; count of entries.
_HEADER = struct.Struct("=IIIII")
#: CRC-32 of all before it. The name that a hard link leads to can be damaged and still be that of another file.
_CHECK = struct.Struct("=I")
#: An entry of its fields, without the check of their number that `Entry._make` would do a million times.
_make_entry: Callable[[Iterable[Any]], Entry] = partial(tuple.__new__, Entry)


#: What may follow in each column after names and notes, as `fields.number` takes it: end and start.
_TIME = (NANOSECONDS, -NANOSECONDS)
_COLUMNS = [(S63, 0), *[(U32, 0)] * 3, *[(U64, 0)] * 3, *[(S63, 0)] * 2, *[_TIME] * 3]
#: Columns before the first signed one (the times), and those up to the last of 32 bits (mode, uid, gid after the kind).
_UNSIGNED, _SMALL = 9, 4
#: In a number of 64 bits as it lies in memory here: its highest byte, and the bytes of its upper half.
_TOP_BYTE, _UPPER_HALF = (7, range(4, 8)) if sys.byteorder == "little" else (0, range(4))
_WITHOUT_SIGN = bytes(range(0x80))
_KINDS, _HARDLINK = frozenset(map(int, Kind)), int(Kind.HARDLINK)
_NO_NAMES = frozenset({"", ".", ".."})
#: Far above any block: paths and notes of thousands of levels, once for each of its entries.
_MOST_BLOCK_BYTES = 256 << 20


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
        block_bytes = b"".join((header, path, names, notes, numbers))
        self._file.write(block_bytes + _CHECK.pack(zlib.crc32(block_bytes)))
        span = Span(self._offset, len(block_bytes) + _CHECK.size)
        self._offset += span.length
        return span

    def flush(self) -> None:
        """Hand what was appended to the kernel."""
        self._file.flush()


def read(fd: int, span: Span) -> Iterator[Block]:
    """Yield the blocks that lie in `span` of the manifest file `fd`.

    Raises ForkError (Malformed) for what no Writer wrote: every name is one that a directory of the source may have,
    and every path leads down from the source.
    """
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
        lengths, _, _ = _read_header(fd, offset)
        length = _HEADER.size + sum(lengths) + _CHECK.size
        yield Span(offset, length)
        offset += length


def _read_header(fd: int, offset: int) -> tuple[list[int], int, bytes]:
    """The lengths of a block's parts, its count of entries, and the header as it is. Raises ForkError (Malformed)."""
    header = os.pread(fd, _HEADER.size, offset)
    with reading("the manifest"):
        if len(header) < _HEADER.size:
            raise Malformed("it ends within a block")
        *lengths, count = _HEADER.unpack(header)
        if not 0 < count <= BLOCK_ENTRIES or sum(lengths) > _MOST_BLOCK_BYTES:
            raise Malformed(f"a block of {count} entries and {sum(lengths)} bytes")
        return lengths, count, header


def _read_block(fd: int, offset: int) -> tuple[Block, int]:
    lengths, count, header = _read_header(fd, offset)
    offset += _HEADER.size
    length = sum(lengths)
    data = os.pread(fd, length + _CHECK.size, offset)
    with reading("the manifest"):
        if len(data) != length + _CHECK.size:
            raise Malformed("it ends within a block")
        body = data[:length]
        if _CHECK.unpack_from(data, length)[0] != zlib.crc32(body, zlib.crc32(header)):
            raise Malformed("the checksum of a block is another one")
        path, names, notes, packed = _split(body, lengths)
        block = Block(relative_path(os.fsdecode(path)), _entries_of(names, notes, packed, count))
    return block, offset + len(data)


def _entries_of(names: bytes, notes: bytes, packed: bytes, count: int) -> list[Entry]:
    """The entries of a block, checked by column, since there may be thousands. Raises Malformed, and ValueError."""
    numbers = _unpack(packed, count)
    if len(numbers) != count * len(_COLUMNS):
        raise Malformed(f"{len(numbers)} numbers for {count} entries")
    columns = [numbers[at : at + count] for at in range(0, len(numbers), count)]
    name_list, note_list = os.fsdecode(names).split("\0"), os.fsdecode(notes).split("\0")
    if b"/" in names or not _NO_NAMES.isdisjoint(name_list):
        raise Malformed("a name that no entry has")
    kinds = columns[0]
    if not _KINDS.issuperset(kinds):
        raise Malformed("a kind that no entry has")
    if _HARDLINK in kinds:
        for kind, note in zip(kinds, note_list, strict=True):
            if kind == _HARDLINK and not relative_path(note):
                raise Malformed("a link to nothing")
    return list(map(_make_entry, zip(name_list, note_list, *columns, strict=True)))


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


def _unpack(packed: bytes, count: int) -> Sequence[int]:
    """The numbers of `count` entries, column by column. Raises Malformed for one that is none of its column's."""
    if packed[:1] == b"t":
        texts = packed[1:].split()
        return [number(int(text), *_COLUMNS[at // count]) for at, text in enumerate(texts)]
    numbers = array("q")
    numbers.frombytes(packed[1:])
    # No number but a time is negative, and no mode or id has more than 32 bits: seen by the upper bytes of each number.
    upper = packed[1 + _TOP_BYTE : 1 + 8 * _UNSIGNED * count : 8]
    small = [packed[1 + 8 * count + byte : 1 + 8 * _SMALL * count : 8] for byte in _UPPER_HALF]
    if upper.translate(None, _WITHOUT_SIGN) or any(half.strip(b"\0") for half in small):
        raise Malformed("a number that no entry has")
    return numbers
