"""The copy rate: one limit for all processes of a host. It holds, and can be changed, while they copy."""

from __future__ import annotations

import fcntl
import os
import signal
import struct
import time
from pathlib import Path
from threading import Event, Thread
from typing import NamedTuple

import pytest

from tasks.copier.copy_rate import FILE, LEAST_RATE, CopyRate, unbounded
from tasks.copier.errors import Code, ForkError
from tasks.copier.progress import Ticker
from tests.fixtures.filesystems import Fresh
from tests.support.engine.child_processes import NOBODY, Child, in_child
from tests.support.engine.forks import MIB, never_stop
from tests.support.processor import LoadFreeStopwatch

_RATE = 32 * MIB
#: The allowed deviation from the limit.
_LEAST, _MOST = 0.9, 1.1
#: The limit for calls that must not wait: far less than they would wait with a copy rate.
_FEW_SECONDS = 10.0


def never_cancel() -> None:
    """A poll callback that never cancels."""


@pytest.fixture
def directory(tmp_path: Path) -> str:
    return str(tmp_path / "runtime")


def copy_pieces(pace: CopyRate, count: int, size: int) -> None:
    for _ in range(count):
        pace(size, never_cancel, 0.0)


class Paced(NamedTuple):
    """What one process measured while it copied pieces, in seconds of the monotonic clock."""

    #: When each piece was within the bound.
    times: list[float]
    #: How long the process was ready to run and had no processor.
    delayed: float


def copied_pieces(pace: CopyRate, count: int, size: int) -> Paced:
    stopwatch, times = LoadFreeStopwatch(list), [time.monotonic()]
    for _ in range(count):
        pace(size, never_cancel, 0.0)
        times.append(time.monotonic())
    return Paced(times[1:], times[-1] - times[0] - stopwatch.seconds())


def test_processes_share_the_copy_rate_and_use_all_of_it(directory: str) -> None:
    size = MIB // 4
    began = time.monotonic()
    children = [Child(lambda: copied_pieces(CopyRate(directory, _RATE), 64, size)) for _ in range(3)]
    found = [Paced(*child.result()) for child in children]

    assert _MOST * _RATE * (time.monotonic() - began) >= 3 * 64 * size
    # From when all copy until the first of them is done. If none of them has a processor, nothing is copied.
    start, end = max(paced.times[0] for paced in found), min(paced.times[-1] for paced in found)
    copied = size * sum(start < at <= end for paced in found for at in paced.times)
    able = end - start - min(paced.delayed for paced in found)
    assert _LEAST * _RATE * able <= copied <= _MOST * _RATE * (end - start)


def test_the_time_of_the_copying_itself_counts_for_a_process_that_is_alone(directory: str) -> None:
    # Given pieces that take nearly as long to copy as the copy rate allows, as on a slow disk
    size, count = _RATE // 4, 6
    ticker = Ticker(never_stop, CopyRate(directory, _RATE))
    stopwatch, needed = LoadFreeStopwatch(list), 0.0

    # When
    for _ in range(count):
        began = time.monotonic()
        time.sleep(0.2)
        needed += max(size / _RATE, time.monotonic() - began)
        ticker.step(size)

    # Then
    assert stopwatch.seconds() <= needed / _LEAST


def test_without_a_copy_rate_nothing_waits_and_nothing_is_created(directory: str) -> None:
    began = time.monotonic()

    copy_pieces(CopyRate(directory), 1000, 1 << 40)

    assert time.monotonic() - began < _FEW_SECONDS
    assert not Path(directory).exists()


def test_a_copy_rate_set_at_run_time_replaces_the_setting_for_all_processes(directory: str) -> None:
    pace, other = CopyRate(directory, _RATE), CopyRate(directory)
    assert (pace.current(), pace.is_set_at_run_time(), other.current()) == (_RATE, False, None)

    other.set(5 * MIB)
    assert {CopyRate(directory, rate).current() for rate in (None, _RATE)} == {5 * MIB}
    other.set(None)
    assert (pace.current(), pace.is_set_at_run_time()) == (None, True)
    copy_pieces(pace, 1000, 1 << 40)


def test_a_waiting_process_continues_when_the_copy_rate_is_removed(directory: str) -> None:
    pace, waits, done = CopyRate(directory, LEAST_RATE), Event(), Event()

    def copy() -> None:
        pace(1 << 40, waits.set, 0.0)
        done.set()

    thread = Thread(target=copy, daemon=True)
    thread.start()
    assert waits.wait(_FEW_SECONDS)
    assert not done.is_set()
    CopyRate(directory).set(None)

    assert done.wait(_FEW_SECONDS)


def test_a_copy_that_waits_can_be_cancelled(directory: str) -> None:
    def cancel() -> None:
        raise ForkError(Code.CANCELLED, "cancelled on request", "")

    with pytest.raises(ForkError, match="cancelled on request"):
        CopyRate(directory, LEAST_RATE)(1 << 40, cancel, 0.0)


def test_a_process_stopped_while_it_holds_the_lock_does_not_block_others(directory: str) -> None:
    CopyRate(directory).set(None)

    def hold() -> None:
        fd = os.open(Path(directory, FILE), os.O_RDWR)
        fcntl.lockf(fd, fcntl.LOCK_EX)
        os.kill(os.getpid(), signal.SIGSTOP)

    holder = Child(hold)
    os.waitpid(holder.pid, os.WUNTRACED)
    try:
        began = time.monotonic()
        CopyRate(directory).set(1 << 50)
        CopyRate(directory)(MIB, never_cancel, 0.0)
        assert time.monotonic() - began < _FEW_SECONDS
    finally:
        holder.kill()


@pytest.mark.parametrize("content", [b"", b"x", b"\xff" * 24, b"\0" * 24, b"x" * 100])
def test_a_damaged_file_sets_no_copy_rate(directory: str, content: bytes) -> None:
    CopyRate(directory).set(MIB)
    Path(directory, FILE).write_bytes(content)

    assert CopyRate(directory).current() is None
    assert CopyRate(directory, _RATE).current() == _RATE
    CopyRate(directory, 1 << 50)(MIB, never_cancel, 0.0)
    CopyRate(directory).set(MIB)
    assert CopyRate(directory).current() == MIB


def test_a_time_from_before_the_last_boot_causes_no_wait(directory: str) -> None:
    CopyRate(directory).set(1 << 50)
    with Path(directory, FILE).open("r+b") as file:
        file.seek(16)
        file.write(struct.pack("=q", time.monotonic_ns() + 7200 * 10**9))
    began = time.monotonic()

    CopyRate(directory)(MIB, never_cancel, 0.0)

    assert time.monotonic() - began < _FEW_SECONDS


def test_a_recreated_directory_is_used(directory: str) -> None:
    pace = CopyRate(directory, _RATE)
    pace(1, never_cancel, 0.0)
    Path(directory, FILE).unlink()
    CopyRate(directory).set(MIB)

    assert pace.current() == MIB


def test_if_no_file_can_be_created_each_process_has_its_own_copy_rate(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    pace, began = CopyRate(str(tmp_path / "file" / "runtime"), _RATE), time.monotonic()

    copy_pieces(pace, 32, MIB // 2)

    assert _MOST * _RATE * (time.monotonic() - began) + _RATE / 5 >= 16 * MIB
    with pytest.raises(NotADirectoryError):
        pace.set(MIB)


def test_the_directory_of_another_user_is_not_used(fresh: Fresh) -> None:
    directory = fresh("tmpfs") / "runtime"
    directory.mkdir()
    os.chown(directory, NOBODY - 1, NOBODY - 1)
    directory.chmod(0o777)

    refusal = in_child(lambda: _refusal(str(directory)), user=NOBODY)

    assert refusal == "the directory belongs to another user"


@pytest.mark.parametrize("is_link", [False, True])
def test_what_another_user_planted_in_a_directory_for_all_is_not_used(fresh: Fresh, is_link: bool) -> None:
    for_all = fresh("tmpfs")
    for_all.chmod(0o1777)
    planted = for_all / "planted"
    planted.mkdir()
    os.chown(planted, NOBODY, NOBODY)
    CopyRate(str(for_all / "own")).set(MIB)
    if is_link:
        planted = for_all / "link"
        planted.symlink_to("own")

    with pytest.raises((PermissionError, NotADirectoryError)):
        CopyRate(str(planted)).set(MIB)


def _refusal(directory: str) -> str:
    try:
        CopyRate(directory).set(MIB)
    except PermissionError as error:
        return str(error.strerror)
    return ""


def test_a_copy_that_waits_continues_to_poll(directory: str) -> None:
    polls: list[int] = []
    ticker = Ticker(lambda progress: polls.append(progress["bytes_done"]), CopyRate(directory, MIB))
    began = time.monotonic()

    ticker.step(MIB)

    assert time.monotonic() - began >= 0.8
    assert polls[0] == MIB
    assert Ticker(never_stop).pace is unbounded
