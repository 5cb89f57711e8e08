"""Heartbeats of a staging directory: renewed while a process works in it, and no longer."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tasks.copier.staging import heartbeat
from tasks.copier.staging.heartbeat import with_heartbeat
from tests.fixtures.filesystems import SmallTmpfs
from tests.fixtures.processes import wait_until

LONG_AGO = 1_000_000_000


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "HEARTBEAT_SECONDS", 0.01)


@contextmanager
def opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    os.utime(fd, (LONG_AGO, LONG_AGO))
    try:
        yield fd
    finally:
        os.close(fd)


def is_touched(fd: int) -> bool:
    return os.fstat(fd).st_mtime > LONG_AGO


def threads() -> int:
    return sum(thread.name == "heartbeat" for thread in threading.enumerate())


def test_one_thread_renews_the_heartbeats_of_all_held_files(tmp_path: Path) -> None:
    with opened(tmp_path / "a") as a, opened(tmp_path / "b") as b, with_heartbeat(a), with_heartbeat(b):
        wait_until(lambda: is_touched(a) and is_touched(b), "both touched")
        assert threads() == 1


def test_the_heartbeat_of_a_released_file_is_not_renewed(tmp_path: Path) -> None:
    with opened(tmp_path / "a") as a, opened(tmp_path / "b") as b, with_heartbeat(b):
        with with_heartbeat(a):
            pass
        os.utime(a, (LONG_AGO, LONG_AGO))
        wait_until(lambda: is_touched(b), "the other touched")

        assert not is_touched(a)


def test_the_thread_ends_when_no_file_is_held_and_starts_again(tmp_path: Path) -> None:
    with opened(tmp_path / "a") as a:
        with with_heartbeat(a):
            pass
        wait_until(lambda: threads() == 0, "the end of the thread")
        with with_heartbeat(a):
            wait_until(lambda: is_touched(a), "a touched")


def test_one_file_that_cannot_be_touched_does_not_affect_others(tmp_path: Path) -> None:
    gone = os.open(tmp_path, os.O_PATH)  # utimensat(2): EBADF
    try:
        with opened(tmp_path / "a") as a, with_heartbeat(gone), with_heartbeat(a):
            wait_until(lambda: is_touched(a), "a touched")
    finally:
        os.close(gone)


def test_a_forked_child_has_its_own_heartbeat(tmp_path: Path) -> None:
    with opened(tmp_path / "a") as a, opened(tmp_path / "b") as b, with_heartbeat(a):
        child = os.fork()
        if child == 0:
            code = 2
            try:
                with with_heartbeat(b):
                    wait_until(lambda: is_touched(b), "b touched")
                    code = 0 if threads() == 1 else 1
            finally:
                os._exit(code)

        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_line_truncated_by_a_full_disk_is_written_again(small_tmpfs: SmallTmpfs) -> None:
    directory = small_tmpfs(64 << 10)
    lock, filler = directory / "lock", directory / "filler"
    lock.write_bytes(bytes(4090))  # a page of 4096 bytes has room for a part of the line
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    fd = os.open(lock, os.O_RDWR)

    with heartbeat.with_heartbeat(fd):
        wait_until(lambda: lock.stat().st_size == 4096, "a part of the line")
        assert not heartbeat.names_living_holder(lock.read_bytes())
        filler.unlink()

        wait_until(lambda: heartbeat.names_living_holder(lock.read_bytes()), "the whole line")
    os.close(fd)
