"""Guest directories as a scheduler stores them, of any size."""

from __future__ import annotations

import functools
import json
import os
import random
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MIB = 1 << 20
GIB = 1 << 30

#: The entries of a `make_guest` directory that a fork with default options skips.
SKIPPED_BY_DEFAULT = frozenset(
    {b"logs", b"logs/console.log", b"vsock.sock", b"firecracker.socket", b"snapshots/snapshot-latest/memory.lz4.tmp"}
)

#: Data is in runs of 64 KiB to 1 MiB with holes between, as in a disk image.
_SMALLEST_RUN = 64 * 1024
_LARGEST_RUN = MIB
#: Data of files up to this size is kept in memory for the next guest.
_LARGEST_KEPT = 8 * MIB


@dataclass(frozen=True, kw_only=True)
class GuestSizes:
    """The sizes of a guest directory's large files: their length, and how much of it is data, in bytes."""

    overlay: int = 64 * MIB
    overlay_data: int = 4 * MIB
    memory: int = 32 * MIB
    memory_data: int = 8 * MIB
    config: int = MIB


def make_guest(path: Path, sizes: GuestSizes | None = None, *, seed: int = 0) -> Path:
    """Make `path` a guest directory and return it. The same seed gives the same content."""
    sizes = sizes or GuestSizes()
    path.mkdir(parents=True, exist_ok=True)
    path.chmod(0o750)
    latest = path / "snapshots" / "snapshot-latest"
    latest.mkdir(parents=True)
    make_sparse_file(path / "overlay.raw", sizes.overlay, sizes.overlay_data, seed=seed)
    make_sparse_file(latest / "memory", sizes.memory, sizes.memory_data, seed=seed + 1)
    make_sparse_file(path / "config.ext4", sizes.config, sizes.config, seed=seed + 2)
    (path / "metadata.json").write_text(json.dumps({"instance": f"vm-{seed}", "vcpus": 2}))
    (path / "config.json").write_text(json.dumps({"memory_mib": sizes.memory // MIB}))
    (path / "state").write_text("paused\n")
    (path / "state").chmod(0o640)
    (path / "logs").mkdir()
    (path / "logs" / "console.log").write_text("booted\n")
    (latest / "memory.lz4.tmp").write_bytes(b"half a compressed file")
    make_socket(path / "vsock.sock")
    make_socket(path / "firecracker.socket")
    return path


def make_sparse_file(path: Path, size: int, data: int, *, seed: int = 0) -> None:
    """Write a file of `size` bytes with about `data` bytes (never more) of random data in scattered runs.

    Every run differs from every other, so that data in the wrong position is detected.
    """
    runs = _kept_runs(size, data, seed) if data <= _LARGEST_KEPT else _runs(size, data, seed)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        os.ftruncate(fd, size)
        for position, run in runs:
            os.pwrite(fd, run, position)
    finally:
        os.close(fd)


@functools.lru_cache(maxsize=16)
def _kept_runs(size: int, data: int, seed: int) -> tuple[tuple[int, bytes], ...]:
    """The runs of a small file. Most tests make the same guest, and random data takes longer to make than to write."""
    return tuple(_runs(size, data, seed))


def _runs(size: int, data: int, seed: int) -> Iterator[tuple[int, bytes]]:
    """Each run of data of a file, with its position."""
    randomness = random.Random(seed)
    if data >= size:
        for position in range(0, size, _LARGEST_RUN):
            yield position, randomness.randbytes(min(_LARGEST_RUN, size - position))
        return
    # The distance to the next run is its share of the rest of the file, or slightly less: the runs are spread over
    # the whole file.
    position, left = 0, data
    while left > 0 and position < size:
        run = min(randomness.randrange(_SMALLEST_RUN, _LARGEST_RUN + 1, 4096), left, size - position)
        yield position, randomness.randbytes(run)
        stride = (size - position) * run // left
        left -= run
        position += max(run + _SMALLEST_RUN, randomness.randrange(stride // 2, stride + 1) // 4096 * 4096)


def make_socket(path: Path) -> None:
    """Leave a socket at `path`, as a running machine does. The path may be longer than sun_path's 107 bytes."""
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"/proc/self/fd/{directory}/{path.name}")
    finally:
        os.close(directory)


def make_slow_file(path: Path, extents: int = 60_000) -> None:
    """A file that takes long to copy for its size: pieces of one block, each followed by a hole."""
    with path.open("wb") as file:
        for n in range(extents):
            os.pwrite(file.fileno(), b"%08d" % n * 512, n * 8192)
        file.truncate(extents * 8192)
