"""A step of the worker's consumer that does something at an interval, while the worker is connected to Redis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from celery import bootsteps


class PeriodicStep(bootsteps.StartStopStep):
    """Calls what its `start` passes to `repeat`, until the connection is lost.

    Celery also stops a step that it has not started, when the connection fails before.
    """

    _timer: Any = None

    def repeat(self, parent: Any, seconds: float, call: Callable[..., None], *arguments: Any) -> None:
        """Call it every so many seconds. `parent` is the worker's consumer."""
        self._timer = parent.timer.call_repeatedly(seconds, call, arguments)

    def stop(self, parent: Any) -> None:
        """Stop it."""
        if self._timer is not None:
            self._timer.cancel()
