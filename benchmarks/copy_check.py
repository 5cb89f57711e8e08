"""A quick comparison of a copy with its source: all names, types and sizes, and a sample of the bytes."""

from __future__ import annotations

import os
import stat
from pathlib import Path

#: How many files are compared by content, in how many places each, and how many bytes a place.
_FILES = 64
_PLACES = 8
_BYTES = 64 << 10


class CopyDiffers(Exception):
    """A copy differs from its source. The message says where."""


def check_same(source: Path, copy: Path, files: int) -> None:
    """Compare `copy` with `source`, which has `files` regular files. Raises CopyDiffers."""
    wanted, found = _listing(source), _listing(copy)
    if wanted != found:
        path = next(iter(sorted(set(wanted.items()) ^ set(found.items()))))[0]
        raise CopyDiffers(
            f"{path}: {found.get(path, 'missing')} in the copy, {wanted.get(path, 'missing')} in the source"
        )
    regular = sorted(path for path, (kind, _) in wanted.items() if kind == stat.S_IFREG)
    if len(regular) != files:
        raise CopyDiffers(f"{len(regular)} files, not {files}")
    for path in regular[:: max(1, len(regular) // _FILES)]:
        _check_bytes(source / path, copy / path)


def _listing(top: Path) -> dict[str, tuple[int, int]]:
    """Relative path → file type, and size in bytes (0 unless it is a regular file)."""
    listing: dict[str, tuple[int, int]] = {}
    pending = [""]
    while pending:
        path = pending.pop()
        with os.scandir(top / path) as entries:
            for entry in entries:
                name = f"{path}{entry.name}"
                status = entry.stat(follow_symlinks=False)
                kind = stat.S_IFMT(status.st_mode)
                listing[name] = kind, status.st_size if kind == stat.S_IFREG else 0
                if kind == stat.S_IFDIR:
                    pending.append(f"{name}/")
    return listing


def _check_bytes(source: Path, copy: Path) -> None:
    with source.open("rb", buffering=0) as src, copy.open("rb", buffering=0) as dst:
        size = os.fstat(src.fileno()).st_size
        for place in range(_PLACES):
            try:
                at = os.lseek(src.fileno(), size * place // _PLACES, os.SEEK_DATA)
            except OSError:  # ENXIO: a hole up to the end
                continue
            if os.pread(src.fileno(), _BYTES, at) != os.pread(dst.fileno(), _BYTES, at):
                raise CopyDiffers(f"{copy.name}: the bytes at {at} differ")
