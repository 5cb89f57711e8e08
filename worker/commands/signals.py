"""How a command ends on a signal: in order, with nothing left behind.

INT, TERM, HUP (the terminal was closed) and QUIT mean the same. A signal that was ignored when the command started
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
from worker.terminal import ShowProgress


def end_on_signals() -> None:
    """Make each ending signal but INT (Python's own KeyboardInterrupt) unwind the program: exit code 128 + signal."""
    for number in _heard():
        if number != signal.SIGINT:
            signal.signal(number, _exit)


@contextmanager
def ended_by_signals(show: ShowProgress) -> Iterator[Callable[[Any], None]]:
    """Yield a beat that shows progress, and that ends the work with ForkError cancelled once a signal has come."""
    received: list[int] = []
    handlers = {number: signal.signal(number, lambda n, _: received.append(n)) for number in _heard()}

    def beat(progress: Any) -> None:
        show(progress)
        if received:
            raise ForkError(Code.CANCELLED, f"ended by {signal.Signals(received[0]).name}", "")

    try:
        yield beat
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _heard() -> list[signal.Signals]:
    return [number for number in ENDING_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]


def _exit(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)
