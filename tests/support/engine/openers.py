"""A process that opens files for writing on request, and measures how long each open takes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PROGRAM = """
import ctypes, os, sys, time
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
kept = None
for line in sys.stdin:
    how, path = line.rstrip("\\n").split(" ", 1)
    began = time.perf_counter()
    kept = open(path, {"read": "rb", "write": "r+b", "map": "r+b"}[how]) if how != "close" else None
    seconds = time.perf_counter() - began
    if how == "map":
        libc.mmap(None, 4096, 3, 1, kept.fileno(), 0)  # PROT_READ | PROT_WRITE, MAP_SHARED; until the process ends
        kept = None
    print(seconds, flush=True)
"""


class Opener:
    """The process. It keeps the file that it opened last open."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def read(self, path: Path) -> float:
        """Open a file for reading. Returns the seconds that the open took, like the other methods."""
        return self._do("read", path)

    def write(self, path: Path) -> float:
        """Open a file for writing."""
        return self._do("write", path)

    def map(self, path: Path) -> float:
        """Make a shared writable mapping of a file until the end of the process, and close its descriptor."""
        return self._do("map", path)

    def close(self) -> float:
        """Close the file."""
        return self._do("close", Path())

    def _do(self, how: str, path: Path) -> float:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(how, path, file=self._process.stdin, flush=True)
        return float(self._process.stdout.readline())


@contextmanager
def opener(*before: str) -> Iterator[Opener]:
    """Start the process, with the command `before` in front of it."""
    with subprocess.Popen(
        [*before, sys.executable, "-S", "-c", _PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield Opener(process)
        finally:
            process.kill()
