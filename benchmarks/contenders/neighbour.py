"""A machine beside a copy: it reads at random and appends with fsync, and measures how long each takes.

    python -m benchmarks.contenders.neighbour FILE LOG

It prints `ready` and works. What begins before the first line of its stdin does not count; the end of stdin ends it. It
prints one line of JSON: by `read` and `fsync`, how many milliseconds each call took.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from threading import Event, Thread

from benchmarks.contenders.timed_process import READY

_BLOCK = 4096
#: Seconds between two reads, and between two appends.
_READ_SECONDS, _APPEND_SECONDS = 0.002, 0.05


#: When a call began, and how long it took, in seconds.
Calls = list[tuple[float, float]]


def _read(path: str, ended: Event, calls: Calls) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    blocks, rng = os.fstat(fd).st_size // _BLOCK, random.Random(1)
    while not ended.wait(_READ_SECONDS):
        at = rng.randrange(blocks) * _BLOCK
        began = time.perf_counter()
        os.pread(fd, _BLOCK, at)
        calls.append((began, time.perf_counter() - began))


def _append(path: str, ended: Event, calls: Calls) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    while not ended.wait(_APPEND_SECONDS):
        began = time.perf_counter()
        os.write(fd, b"x" * _BLOCK)
        os.fsync(fd)
        calls.append((began, time.perf_counter() - began))


def _main() -> None:
    reads: Calls = []
    fsyncs: Calls = []
    ended = Event()
    threads = [
        Thread(target=work, args=(path, ended, calls))
        for work, path, calls in ((_read, sys.argv[1], reads), (_append, sys.argv[2], fsyncs))
    ]
    for thread in threads:
        thread.start()
    print(READY, flush=True)
    sys.stdin.readline()
    start = time.perf_counter()
    sys.stdin.read()
    ended.set()
    for thread in threads:
        thread.join()
    took = {
        what: [seconds * 1e3 for began, seconds in calls if began >= start]
        for what, calls in (("read", reads), ("fsync", fsyncs))
    }
    print(json.dumps(took), flush=True)


if __name__ == "__main__":
    _main()
