"""The manifest on disk: the entries of the source, in blocks that any process can read from any offset.

A block has at most `walk.BLOCK_ENTRIES` entries. It consists of a header, the path of the directory, the names and
notes of the entries (separated by NUL, which no path contains), twelve columns of 64-bit numbers, and a checksum.
Whole columns are written and read at once: a million entries take about half a second.
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
from tasks.copier.validation import NANOSECONDS, S63, U32, U64, Malformed, integer, reading, relative_path

#: Lengths of path, names, notes and numbers in bytes, and the number of entries.
_HEADER = struct.Struct("=IIIII")
#: CRC-32 of everything before it. Without it, a damaged path of a hard link could name another file.
_CHECK = struct.Struct("=I")
#: An entry from its fields. `Entry._make` would check their number, a million times.
_make_entry: Callable[[Iterable[Any]], Entry] = partial(tuple.__new__, Entry)


#: The range of each column of numbers, as `validation.integer` takes it: end and start.
_TIME = (NANOSECONDS, -NANOSECONDS)
_COLUMNS = [(S63, 0), *[(U32, 0)] * 3, *[(U64, 0)] * 3, *[(S63, 0)] * 2, *[_TIME] * 3]
#: The number of columns before the signed ones (the times), and up to the last of 32 bits (kind, mode, uid, gid).
_UNSIGNED, _SMALL = 9, 4
#: In the memory of a 64-bit number on this machine: the index of its highest byte, and those of its upper half.
_TOP_BYTE, _UPPER_HALF = (7, range(4, 8)) if sys.byteorder == "little" else (0, range(4))
_WITHOUT_SIGN = bytes(range(0x80))
_KINDS, _HARDLINK = frozenset(map(int, Kind)), int(Kind.HARDLINK)
_NO_NAMES = frozenset({"", ".", ".."})
#: Far above any block, even if paths and notes have thousands of levels.
_MOST_BLOCK_BYTES = 256 << 20


class Span(NamedTuple):
    """The place of one or several blocks in the manifest: offset and length in bytes."""

    offset: int
    length: int


class Writer:
    """Appends blocks to a manifest file. Other processes can read them after `flush`."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._offset = 0

    def append(self, block: Block) -> Span:
        """Write `block`. Returns its place."""
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
        """Pass the appended blocks to the kernel."""
        self._file.flush()


class Kept:
    """A manifest in the memory of the process that walks. Its spans are numbers of blocks, not bytes."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []

    def append(self, block: Block) -> Span:
        """Keep `block`. Returns its place."""
        self.blocks.append(block)
        return Span(len(self.blocks) - 1, 1)

    def read(self, part: Span | None, *, backwards: bool) -> Iterator[Block]:
        """Yield the blocks in `part` of the manifest, or all."""
        blocks = self.blocks if part is None else self.blocks[part.offset : part.offset + part.length]
        return reversed(blocks) if backwards else iter(blocks)


def read(fd: int, span: Span) -> Iterator[Block]:
    """Yield the blocks in `span` of the manifest file `fd`.

    Raises Malformed for anything that a Writer does not write. Names and paths are checked too: no entry is outside the
    source.
    """
    offset, end = span.offset, span.offset + span.length
    while offset < end:
        block, offset = _read_block(fd, offset)
        yield block


def whole(fd: int) -> Span:
    """The span of all blocks of the manifest file `fd`."""
    return Span(0, os.fstat(fd).st_size)


def spans(fd: int) -> Iterator[Span]:
    """Yield the span of each block of the manifest file `fd`, in order. Raises Malformed."""
    offset, end = whole(fd)
    while offset < end:
        lengths, _, _ = _read_header(fd, offset)
        length = _HEADER.size + sum(lengths) + _CHECK.size
        yield Span(offset, length)
        offset += length


def _read_header(fd: int, offset: int) -> tuple[list[int], int, bytes]:
    """The lengths of a block's parts, its number of entries, and the header itself. Raises Malformed."""
    header = os.pread(fd, _HEADER.size, offset)
    with reading("the manifest"):
        if len(header) < _HEADER.size:
            raise Malformed("it ends within a block")
        *lengths, count = _HEADER.unpack(header)
        if not 0 < count <= BLOCK_ENTRIES or sum(lengths) > _MOST_BLOCK_BYTES:
            raise Malformed(f"a block has {count} entries and {sum(lengths)} bytes")
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
            raise Malformed("the checksum of a block does not match")
        path, names, notes, packed = _split(body, lengths)
        block = Block(relative_path(os.fsdecode(path)), _entries_of(names, notes, packed, count))
    return block, offset + len(data)


def _entries_of(names: bytes, notes: bytes, packed: bytes, count: int) -> list[Entry]:
    """The entries of a block. They are checked by column, which is faster. Raises Malformed, ValueError."""
    numbers = _unpack(packed, count)
    if len(numbers) != count * len(_COLUMNS):
        raise Malformed(f"a block of {count} entries has {len(numbers)} numbers")
    columns = [numbers[at : at + count] for at in range(0, len(numbers), count)]
    name_list, note_list = os.fsdecode(names).split("\0"), os.fsdecode(notes).split("\0")
    if b"/" in names or not _NO_NAMES.isdisjoint(name_list):
        raise Malformed("an entry has an invalid name")
    kinds = columns[0]
    if not _KINDS.issuperset(kinds):
        raise Malformed("an entry has an invalid kind")
    if _HARDLINK in kinds:
        for kind, note in zip(kinds, note_list, strict=True):
            if kind == _HARDLINK and not relative_path(note):
                raise Malformed("a hard link has no target")
    return list(map(_make_entry, zip(name_list, note_list, *columns, strict=True)))


def _split(body: bytes, lengths: list[int]) -> list[bytes]:
    parts, at = [], 0
    for length in lengths:
        parts.append(body[at : at + length])
        at += length
    return parts


def _pack(numbers: list[int]) -> bytes:
    """Numbers as an array of 64-bit integers ("q"), or as text ("t") if one does not fit.

    Inodes of tmpfs and overlayfs use 64 bits unsigned. Times are signed, and may be after the year 2262.
    """
    try:
        return b"q" + array("q", numbers).tobytes()
    except OverflowError:
        return b"t" + " ".join(map(str, numbers)).encode("ascii")


def _unpack(packed: bytes, count: int) -> Sequence[int]:
    """The numbers of `count` entries, column by column. Raises Malformed for one outside the range of its column."""
    if packed[:1] == b"t":
        texts = packed[1:].split()
        return [integer(int(text), *_COLUMNS[at // count]) for at, text in enumerate(texts)]
    numbers = array("q")
    numbers.frombytes(packed[1:])
    # Only times may be negative, and modes and ids have at most 32 bits. The upper bytes of each number show that.
    upper = packed[1 + _TOP_BYTE : 1 + 8 * _UNSIGNED * count : 8]
    small = [packed[1 + 8 * count + byte : 1 + 8 * _SMALL * count : 8] for byte in _UPPER_HALF]
    if upper.translate(None, _WITHOUT_SIGN) or any(half.strip(b"\0") for half in small):
        raise Malformed("an entry has a number out of range")
    return numbers
