"""Blocks of zeros in data that was read. They are the holes of a file whose filesystem reports every byte as data."""

from __future__ import annotations

from collections.abc import Iterator

#: The smallest hole that is kept, in bytes: the block size of most filesystems.
BLOCK = 4096
_ZERO_BLOCK = bytes(BLOCK)


def nonzero_runs(data: bytearray, length: int, offset: int) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of each run of blocks in `data[:length]` that are not all zeros, as offsets into `data`.

    `offset` is the position of the data in the file. Blocks begin at multiples of `BLOCK` in the file.
    """
    start, at = None, 0
    while at < length:
        end = min(length, at + BLOCK - (offset + at) % BLOCK)
        if data.startswith(_ZERO_BLOCK[: end - at], at, end):  # compares in place
            if start is not None:
                yield start, at
            start = None
        elif start is None:
            start = at
        at = end
    if start is not None:
        yield start, length
