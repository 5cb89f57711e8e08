"""What is forked: directory trees, generated in seconds and the same in each run."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

_KIB, _MIB, _GIB = 1 << 10, 1 << 20, 1 << 30

#: An image of `inst`: its length in bytes, and its pieces of data of 1 MiB each with holes between them.
_IMAGE_BYTES = 2 * _GIB
_IMAGE_PIECES = 512
#: The dense file of `big`.
_BIG_BYTES = 4 * _GIB
#: Sizes of the files of `tree`, in bytes.
_TREE_SIZES = range(4 * _KIB, 10 * _KIB + 1)
#: Length of a file of `mini`, in bytes.
_MINI_BYTES = 200_000
#: Tiny files are shorter than this, in bytes; every other one is empty.
_TINY_BYTES = 64
#: What the directory entry, the inode and the block of a tiny file take, at most, in bytes.
_TINY_ROOM = 6 * _KIB


@dataclass(frozen=True)
class Case:
    """One input."""

    name: str
    about: str
    #: Regular files in it.
    files: int
    #: Bytes on a filesystem for the source and one copy whose holes are filled.
    room: int
    #: Fills an empty directory.
    build: Callable[[Path], None]


def small_files(name: str, files: int, directories: int) -> Case:
    """A case of `files` empty or tiny files, spread evenly over `directories`."""

    def build(top: Path) -> None:
        tiny = random.Random(2).randbytes(_TINY_BYTES)
        a_directory = files // directories
        _build_flat(top, directories, [tiny[: n % _TINY_BYTES] if n % 2 else b"" for n in range(a_directory)])

    return Case(name, f"{files:,} empty or tiny files", files, 2 * files * _TINY_ROOM, build)


def _build_inst(top: Path) -> None:
    """A guest directory: two sparse images and four small files."""
    rng = random.Random(1)
    pieces = [rng.randbytes(_MIB) for _ in range(8)]
    snapshot = top / "snapshots" / "latest"
    snapshot.mkdir(parents=True)
    for image in (top / "overlay.raw", snapshot / "memory"):
        with image.open("wb", buffering=0) as file:
            file.truncate(_IMAGE_BYTES)  # first: XFS preallocates behind a file that grows
            for n in range(_IMAGE_PIECES):
                file.seek(n * (_IMAGE_BYTES // _IMAGE_PIECES))
                file.write(pieces[n % len(pieces)])
    for small in (top / "config.ext4", top / "config.json", top / "metadata.json", snapshot / "state"):
        small.write_bytes(pieces[0][: 16 * _KIB])


def _build_tree(top: Path) -> None:
    data = random.Random(3).randbytes(2 * _TREE_SIZES[-1])
    sizes = [_TREE_SIZES[n * 2_654_435_761 % len(_TREE_SIZES)] for n in range(200)]
    _build_flat(top, 100, [data[size : 2 * size] for size in sizes])


def _build_mini(top: Path) -> None:
    data = random.Random(5).randbytes(_MINI_BYTES)
    for number in range(6):
        (top / f"file-{number}").write_bytes(data)


def _build_big(top: Path) -> None:
    rng = random.Random(4)
    pieces = [rng.randbytes(4 * _MIB) for _ in range(4)]
    with (top / "dense.raw").open("wb", buffering=0) as file:
        for n in range(_BIG_BYTES // len(pieces[0])):
            file.write(pieces[n % len(pieces)])


def _build_one(top: Path) -> None:
    (top / "disk.raw").write_bytes(random.Random(5).randbytes(100_000))


def _build_flat(top: Path, directories: int, contents: Sequence[bytes]) -> None:
    """Directories side by side, each with one file for each of `contents`."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    for number in range(directories):
        directory = top / f"d{number:05}"
        directory.mkdir()
        directory_fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        for n, content in enumerate(contents):
            fd = os.open(f"file-{n:06}", flags, 0o644, dir_fd=directory_fd)
            if content:
                os.write(fd, content)
            os.close(fd)
        os.close(directory_fd)


INST = Case("inst", "6 files: 2 x 2 GiB with 512 extents each, 1 GiB of data in all", 6, 6 * _GIB, _build_inst)
TREE = Case("tree", "20,000 files of 4 to 10 KiB in 100 directories", 20_000, _GIB, _build_tree)
BIG = Case("big", "one dense file of 4 GiB", 1, 9 * _GIB, _build_big)
WIDE = small_files("wide", 200_000, 200)
#: Not in the table: a fork this small is measured a thousand times.
MINI = Case("mini", "6 files of 200 KB", 6, 2 * _GIB, _build_mini)
#: For a campaign of a hundred thousand forks, each a directory and an inode.
ONE = Case("one", "one file of 100 KB", 1, 4 * _GIB, _build_one)

CASES = {case.name: case for case in (INST, TREE, BIG, WIDE)}
