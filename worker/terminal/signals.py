"""How a command ends on a signal: it cleans up first.

INT, TERM, HUP (the terminal was closed) and QUIT are treated alike. A signal that was ignored when the command started
stays ignored: `nohup` and a shell's background jobs rely on it.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from tasks.copier.errors import Code, ForkError
from tasks.copier.kernel.processes import ENDING_SIGNALS
from worker.exit_codes import of_signal
from worker.terminal.printing import ShowProgress

#: How long the command may still take after a second signal, in seconds. Some programs pass on a signal that the
#: terminal has sent to all processes already; a clean end is then still possible.
_LAST_SECONDS = 0.5


def exit_on_signals() -> None:
    """Make each signal except INT raise SystemExit with its exit code. Python raises KeyboardInterrupt for INT."""
    for number in _not_ignored():
        if number != signal.SIGINT:
            signal.signal(number, _exit)


@contextmanager
def cancelled_by_signals(show: ShowProgress) -> Iterator[Callable[[Any], None]]:
    """Yield a function for the engine to call with its progress.

    It shows the progress. After a signal it raises ForkError cancelled, so that the engine removes what it made. A
    second signal ends the process, also one that waits in a system call.
    """
    received: list[int] = []

    def poll(progress: Any) -> None:
        show(progress)
        if received:
            raise ForkError(Code.CANCELLED, f"ended by {signal.Signals(received[0]).name}", "")

    with _received_by_thread(received):
        yield poll


@contextmanager
def _received_by_thread(received: list[int]) -> Iterator[None]:
    """Add the signals of this process to a list within the context. The second one ends the process.

    The signals are blocked in all other threads. The main thread may wait in a read from a FUSE filesystem that hangs:
    then it handles no signal, and keeps the others from it.
    """
    numbers = _not_ignored()
    is_over = threading.Event()

    def receive() -> None:
        while not is_over.is_set():
            number = signal.sigwait(numbers)
            received.append(number)
            if len(received) > 1 and not is_over.wait(_LAST_SECONDS):
                os.write(sys.stderr.fileno(), b"forkvm: ended by a second signal; forkvm gc removes what is left\n")
                os._exit(of_signal(number))

    if not numbers:
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    thread = threading.Thread(target=receive, name="signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        os.kill(os.getpid(), numbers[0])  # ends the wait
        thread.join()
        signal.sigtimedwait(numbers, 0)  # what the thread did not take
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _not_ignored() -> list[signal.Signals]:
    return [number for number in ENDING_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]


def _exit(number: int, frame: FrameType | None) -> None:
    sys.exit(of_signal(number))
