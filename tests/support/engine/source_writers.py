"""Changes that a test makes to a source while it is forked, at a given step."""

from __future__ import annotations

import time
from collections.abc import Callable

from tasks.copier.progress import Progress
from tests.support.engine.forks import MIB

#: CLOCK_REALTIME_COARSE of <linux/time.h>, which the module time does not define.
_COARSE_CLOCK = 5


def wait_for_clock_tick() -> None:
    """Wait until the clock of file timestamps has advanced: two changes within one tick have the same ctime."""
    before = time.clock_gettime_ns(_COARSE_CLOCK)
    while time.clock_gettime_ns(_COARSE_CLOCK) == before:
        time.sleep(0.001)


class ChangeOnce:
    """A poll callback that changes something once, when `when` first holds."""

    def __init__(self, change: Callable[[], object], when: Callable[[Progress], bool]) -> None:
        self._change = change
        self._when = when
        self.done = False

    def __call__(self, progress: Progress) -> None:
        if not self.done and self._when(progress):
            self.done = True
            wait_for_clock_tick()
            self._change()


def planning(progress: Progress) -> bool:
    """After the first block of the walk at the latest."""
    return progress["phase"] == "plan"


def copying(progress: Progress) -> bool:
    """After the walk and the first file (the largest)."""
    return progress["phase"] == "copy" and progress["files_done"] > 0


def in_a_file(progress: Progress) -> bool:
    """In the middle of the largest file, while it is copied."""
    return progress["phase"] == "copy" and progress["bytes_done"] > MIB


def closing(progress: Progress) -> bool:
    """When all files are cloned."""
    return progress["phase"] == "publish"
