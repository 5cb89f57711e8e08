"""Finding blocks of zeros in data that was read."""

from __future__ import annotations

import random

import pytest

from tasks.copier.clone.zeros import BLOCK, nonzero_runs


@pytest.mark.parametrize(
    ("data", "offset", "runs"),
    [
        (b"", 0, []),
        (bytes(BLOCK), 0, []),
        (bytes(100), 0, []),
        (b"x" + bytes(BLOCK - 1), 0, [(0, BLOCK)]),
        (bytes(2 * BLOCK) + b"x", 0, [(2 * BLOCK, 2 * BLOCK + 1)]),
        (bytes(BLOCK) + b"x" * BLOCK + bytes(BLOCK), BLOCK, [(BLOCK, 2 * BLOCK)]),
        # A block of the file begins within the data.
        (b"x" + bytes(BLOCK), BLOCK - 1, [(0, 1)]),
        (bytes(BLOCK - 1) + b"x", 1, [(BLOCK - 1, BLOCK)]),
        (b"xx" + bytes(BLOCK - 4) + b"xx", BLOCK - 2, [(0, BLOCK)]),
    ],
)
def test_runs_are_whole_blocks_of_the_file_that_are_not_zero(
    data: bytes, offset: int, runs: list[tuple[int, int]]
) -> None:
    assert list(nonzero_runs(bytearray(data), len(data), offset)) == runs


def test_bytes_after_the_length_are_ignored() -> None:
    assert list(nonzero_runs(bytearray(BLOCK) + b"x", BLOCK, 0)) == []


def test_bytes_between_the_runs_are_zero_and_no_run_has_a_zero_block() -> None:
    rng = random.Random(5)
    for _ in range(200):
        size, offset = rng.randrange(40_000), rng.randrange(3 * BLOCK)
        data = bytearray(size)
        for _ in range(rng.randrange(6)):
            if size:
                data[rng.randrange(size)] = 1
        rebuilt, end = bytearray(size), 0
        for first, last in nonzero_runs(data, size, offset):
            assert end <= first < last <= size
            assert first == 0 or (offset + first) % BLOCK == 0
            assert last == size or (offset + last) % BLOCK == 0
            rebuilt[first:last], end = data[first:last], last
            for at in range(first - (offset + first) % BLOCK, last, BLOCK):
                assert any(data[max(at, first) : min(at + BLOCK, last)])
        assert rebuilt == data
