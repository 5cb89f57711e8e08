"""A machine beside a copy: it reads at random and appends with fsync, and measures how long each takes.

    python -m benchmarks.contenders.neighbour FILE LOG

It prints `ready`, works until its stdin is closed, and prints one line of JSON: milliseconds by `read p50`, `read p99`,
`fsync p50` and `fsync p99`.
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


def _read(path: str, ended: Event, seconds: list[float]) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    blocks, rng = os.fstat(fd).st_size // _BLOCK, random.Random(1)
    while not ended.wait(_READ_SECONDS):
        at = rng.randrange(blocks) * _BLOCK
        began = time.perf_counter()
        os.pread(fd, _BLOCK, at)
        seconds.append(time.perf_counter() - began)


def _append(path: str, ended: Event, seconds: list[float]) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    while not ended.wait(_APPEND_SECONDS):
        began = time.perf_counter()
        os.write(fd, b"x" * _BLOCK)
        os.fsync(fd)
        seconds.append(time.perf_counter() - began)


def _percentile(seconds: list[float], share: float) -> float:
    """In milliseconds."""
    return sorted(seconds)[min(len(seconds) - 1, int(len(seconds) * share))] * 1e3


def _main() -> None:
    reads: list[float] = []
    fsyncs: list[float] = []
    ended = Event()
    threads = [
        Thread(target=work, args=(path, ended, seconds))
        for work, path, seconds in ((_read, sys.argv[1], reads), (_append, sys.argv[2], fsyncs))
    ]
    for thread in threads:
        thread.start()
    print(READY, flush=True)
    sys.stdin.read()
    ended.set()
    for thread in threads:
        thread.join()
    figures = {
        f"{what} p{int(share * 100)}": _percentile(seconds, share)
        for what, seconds in (("read", reads), ("fsync", fsyncs))
        for share in (0.5, 0.99)
    }
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    _main()
