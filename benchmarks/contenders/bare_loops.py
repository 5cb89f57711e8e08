"""The limit for a Python program: bare loops in two processes, without metadata, checks or results.

Reflinks: walk the source and make the directories, then openat, openat, FICLONE, close, close for each file.
Sparse copies: the same walk with the sizes, then copy_file_range over the extents that SEEK_DATA finds.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

from tasks.copier.kernel.syscalls import ficlone

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_CLOEXEC
_WRITE = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
#: A file of at least this length, in bytes, may be split between the processes.
_CUT_BYTES = 64 << 20
#: The cost of creating a file, as bytes copied.
_FILE_WEIGHT = 4096

Part = TypeVar("Part")


class _Names(NamedTuple):
    """Some files of one directory."""

    directory: str
    names: list[str]


class _Range(NamedTuple):
    """One file's bytes from `start` to `end`; the file is `size` bytes long."""

    directory: str
    name: str
    size: int
    start: int
    end: int


def clone_tree(source: str, destination: str) -> None:
    """Reflink each file."""
    found = [_Names(directory, [entry.name for entry in files]) for directory, files in _walk(source, destination)]
    _in_two_processes(_halves_by_count(found), lambda part: _clone(source, destination, part))


def clone_often(source: str, destinations: Sequence[str]) -> None:
    """Reflink each file into each destination."""
    _in_two_processes((destinations[::2], destinations[1::2]), lambda part: _clone_into_each(source, part))


def _clone_into_each(source: str, destinations: Sequence[str]) -> None:
    for destination in destinations:
        found = [_Names(directory, [entry.name for entry in files]) for directory, files in _walk(source, destination)]
        _clone(source, destination, found)


def copy_tree(source: str, destination: str) -> None:
    """Copy each file's data, and keep its holes."""
    found: list[tuple[str, str, os.stat_result]] = []
    for directory, files in _walk(source, destination):
        found += [(directory, entry.name, entry.stat(follow_symlinks=False)) for entry in files]
    _in_two_processes(_halves_by_bytes(found), lambda part: _copy(source, destination, part))


def _walk(source: str, destination: str) -> Iterator[tuple[str, list[os.DirEntry[str]]]]:
    """Yield each directory's path below `source` with its files; make the directory in `destination`."""
    pending = [""]
    while pending:
        path = pending.pop()
        os.mkdir(destination + path, 0o700)
        files: list[os.DirEntry[str]] = []
        with os.scandir(source + path) as listing:
            for entry in listing:
                if entry.is_dir(follow_symlinks=False):
                    pending.append(f"{path}/{entry.name}")
                else:
                    files.append(entry)
        yield path, files


def _halves_by_count(found: list[_Names]) -> tuple[list[_Names], list[_Names]]:
    """Both halves of the files, each in as few directories as possible."""
    left = sum(len(names) for _, names in found) // 2
    halves: tuple[list[_Names], list[_Names]] = ([], [])
    for directory, names in found:
        if names[:left]:
            halves[0].append(_Names(directory, names[:left]))
        if names[left:]:
            halves[1].append(_Names(directory, names[left:]))
        left = max(0, left - len(names))
    return halves


def _halves_by_bytes(found: list[tuple[str, str, os.stat_result]]) -> tuple[list[_Range], list[_Range]]:
    """Both halves of the data."""
    left = sum(_weight(status) for _, _, status in found) // 2
    halves: tuple[list[_Range], list[_Range]] = ([], [])
    for directory, name, status in found:
        weight, size = _weight(status), status.st_size
        if left <= 0:
            cut = 0
        elif weight > left and size >= _CUT_BYTES:
            cut = size * left // weight
        else:
            cut = size
        if cut or left > 0:
            halves[0].append(_Range(directory, name, size, 0, cut))
        if cut < size or left <= 0:
            halves[1].append(_Range(directory, name, size, cut, size))
        left -= weight
    return halves


def _weight(status: os.stat_result) -> int:
    return status.st_blocks * 512 + _FILE_WEIGHT


def _in_two_processes(halves: tuple[Sequence[Part], Sequence[Part]], work: Callable[[Sequence[Part]], None]) -> None:
    """Do the second half in a child process and the first half here. A single file needs no child."""
    if not halves[0] or not halves[1]:
        work(halves[0] or halves[1])
        return
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work(halves[1])
            code = 0
        except BaseException:
            traceback.print_exc(file=sys.stderr)
        finally:
            os._exit(code)
    try:
        work(halves[0])
    finally:
        _, status = os.waitpid(child, 0)
    if status:
        raise RuntimeError("the second process failed")


def _clone(source: str, destination: str, part: Sequence[_Names]) -> None:
    for directory, names in part:
        with _opened(source + directory) as source_fd, _opened(destination + directory) as destination_fd:
            for name in names:
                src = os.open(name, _READ, dir_fd=source_fd)
                dst = os.open(name, _WRITE, 0o600, dir_fd=destination_fd)
                ficlone(dst, src)
                os.close(dst)
                os.close(src)


def _copy(source: str, destination: str, part: Sequence[_Range]) -> None:
    at, source_fd, destination_fd = None, -1, -1
    for directory, name, size, start, end in part:
        if directory != at:
            _close(source_fd, destination_fd)
            source_fd, destination_fd = (os.open(top + directory, _DIRECTORY) for top in (source, destination))
            at = directory
        src = os.open(name, _READ, dir_fd=source_fd)
        dst = os.open(name, _WRITE, 0o600, dir_fd=destination_fd)
        if size:
            os.ftruncate(dst, size)
            _copy_extents(src, dst, start, end)
        os.close(dst)
        os.close(src)
    _close(source_fd, destination_fd)


def _copy_extents(src: int, dst: int, start: int, end: int) -> None:
    at = start
    while at < end:
        try:
            data = os.lseek(src, at, os.SEEK_DATA)
        except OSError:  # ENXIO: only a hole is left
            return
        at = min(os.lseek(src, data, os.SEEK_HOLE), end)
        while data < at:
            data += os.copy_file_range(src, dst, at - data, data, data)


@contextmanager
def _opened(directory: str) -> Iterator[int]:
    fd = os.open(directory, _DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


def _close(*fds: int) -> None:
    for fd in fds:
        if fd >= 0:
            os.close(fd)
