"""How a command ends on a signal: it cleans up first.

INT, TERM, HUP (the terminal was closed) and QUIT are treated alike. A signal that was ignored when the command started
stays ignored: `nohup` and a shell's background jobs rely on it.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from tasks.copier.errors import Code, ForkError
from tasks.copier.kernel.processes import ENDING_SIGNALS
from worker.exit_codes import of_signal
from worker.terminal.printing import ShowProgress


def exit_on_signals() -> None:
    """Make each signal except INT raise SystemExit with its exit code. Python raises KeyboardInterrupt for INT."""
    for number in _not_ignored():
        if number != signal.SIGINT:
            signal.signal(number, _exit)


@contextmanager
def cancelled_by_signals(show: ShowProgress) -> Iterator[Callable[[Any], None]]:
    """Yield a function for the engine to call with its progress.

    It shows the progress. After a signal it raises ForkError cancelled, so that the engine removes what it made.
    """
    received: list[int] = []
    handlers = {number: signal.signal(number, lambda n, _: received.append(n)) for number in _not_ignored()}

    def poll(progress: Any) -> None:
        show(progress)
        if received:
            raise ForkError(Code.CANCELLED, f"ended by {signal.Signals(received[0]).name}", "")

    try:
        yield poll
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _not_ignored() -> list[signal.Signals]:
    return [number for number in ENDING_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]


def _exit(number: int, frame: FrameType | None) -> None:
    sys.exit(of_signal(number))
