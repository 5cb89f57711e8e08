"""Values that take long to read, or may hang: a thread reads each at an interval, and a request gets the last one.

A root on a dead NFS server blocks its thread only, and its value grows old.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from threading import Thread
from typing import Generic, TypeVar

T = TypeVar("T")
log = logging.getLogger(__name__)

#: How often a value is read, in seconds.
INTERVAL_SECONDS = 5.0
#: A value of this age, in seconds, is not used any more: three readings failed or did not return.
_OLD_SECONDS = 20.0


class Reading(Generic[T]):
    """One such value. `read` is called in a thread of its own, and may raise `errors`."""

    def __init__(self, name: str, read: Callable[[], T], *errors: type[Exception]) -> None:
        self._read = read
        self._errors = errors
        self._last: tuple[float, T] | None = None
        self._thread = Thread(target=self._run, name=f"reading {name}", daemon=True)

    def start(self) -> None:
        """Start to read."""
        self._thread.start()

    def value(self) -> T | None:
        """The last value; None if the last reading failed, or if it is old."""
        last = self._last
        if last is None or time.monotonic() - last[0] > _OLD_SECONDS:
            return None
        return last[1]

    def _run(self) -> None:
        while True:
            try:
                self._last = time.monotonic(), self._read()
            except self._errors:
                self._last = None
            except Exception as error:  # without its thread, the value would never come back
                self._last = None
                log.warning("the %s failed: %s: %s", self._thread.name, type(error).__name__, error)
            time.sleep(INTERVAL_SECONDS)
