"""The largest Celery message and the largest Redis value of one fork.

They are read from the append-only file of Redis, which holds each write with its arguments, also of messages that a
worker took at once. The sizes of the remaining keys are read too, since a set or a hash grows by many small writes.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from benchmarks.cases import WIDE
from benchmarks.contenders.service import Service
from benchmarks.filesystems import Filesystem
from benchmarks.log import log
from benchmarks.report.tables import Finding
from benchmarks.rounds import built, run_once

CASES = (WIDE,)

_MOST_MESSAGE_KIB = 4.0
_MOST_VALUE_KIB = 1024.0
_PUSHES = (b"LPUSH", b"RPUSH")


def measure_messages(filesystem: Filesystem, service: Service) -> Iterator[Finding]:
    """One fork of `wide` through Redis."""
    with built(WIDE, filesystem) as source:
        log(f"messages: {WIDE.name} on {filesystem.name}")
        files = _append_only_files(service.redis_directory)
        before = {path: path.stat().st_size for path in files}
        run_once(service.contender(), filesystem, source, WIDE.files)
        _write_out(service)
        messages, argument = _written(before, service.redis_directory)
    key, taken = _largest_key(service)
    where = f"{WIDE.about}, {filesystem.name}"
    yield Finding(f"{where}: Celery messages", len(messages), "messages")
    yield Finding(f"{where}: largest Celery message", max(messages) / 1024, "KiB", _MOST_MESSAGE_KIB)
    yield Finding(f"{where}: largest value written to Redis", argument / 1024, "KiB", _MOST_VALUE_KIB)
    yield Finding(f"{where}: largest key at its end, {key}", taken / 1024, "KiB", _MOST_VALUE_KIB)


def _write_out(service: Service) -> None:
    """Have Redis write out its append-only file: with appendfsync=always it does before it answers a write."""
    service.redis.config_set("appendfsync", "always")
    service.redis.set("forkvm:bench:end", b"", ex=60)
    service.redis.config_set("appendfsync", "everysec")


def _append_only_files(directory: Path) -> list[Path]:
    """Redis 7 has a directory of them; earlier versions have one file."""
    return sorted([*directory.glob("appendonlydir/*.incr.aof"), *directory.glob("appendonly.aof")])


def _written(before: dict[Path, int], directory: Path) -> tuple[list[int], int]:
    """The lengths of all messages, and the length of the longest argument of any other write, in bytes."""
    messages: list[int] = []
    longest = 0
    for path in _append_only_files(directory):
        with path.open("rb") as file:
            file.seek(before.get(path, 0))
            for command, *arguments in _commands(file):
                if command.upper() in _PUSHES:
                    messages += [len(message) for message in arguments[1:]]
                else:
                    longest = max([longest, *(len(argument) for argument in arguments)])
    return messages, longest


def _commands(file: BinaryIO) -> Iterator[list[bytes]]:
    """Yield each command of an append-only file: an array of bulk strings in the Redis protocol."""
    while line := file.readline():
        if line.startswith(b"*"):
            yield [_bulk_string(file) for _ in range(int(line[1:]))]


def _bulk_string(file: BinaryIO) -> bytes:
    length = int(file.readline()[1:])
    value = file.read(length)
    file.seek(2, io.SEEK_CUR)
    return value


def _largest_key(service: Service) -> tuple[str, int]:
    largest = ("none", 0)
    for key in service.redis.scan_iter(count=1000):
        taken = service.redis.memory_usage(key, samples=0) or 0
        if taken > largest[1]:
            # The key's name without the fork id.
            largest = ":".join(part for part in key.decode().split(":") if not part.startswith("bench-")), taken
    return largest
