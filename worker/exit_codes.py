"""The exit codes of all commands. Each command's help lists those that it can end with."""

from __future__ import annotations

import signal

DONE = 0
#: The work failed or was cancelled; each command's help says what that means for it.
FAILED = 1
#: Wrong arguments, settings or request.
BAD_CALL = 2
NO_BROKER = 3
#: EX_SOFTWARE of sysexits.h.
PROGRAM_FAULT = 70
#: As timeout(1) has it.
TIMED_OUT = 124


def of_signal(number: int) -> int:
    """The exit code of a command that a signal ended, as shells report it."""
    return 128 + number


#: Ctrl-C: 130.
INTERRUPTED = of_signal(signal.SIGINT)

#: The meaning of each code that is the same for all commands, for their help.
MEANINGS: dict[int, str] = {
    DONE: "Success.",
    BAD_CALL: "Wrong arguments, settings or request.",
    NO_BROKER: "Redis cannot be reached, cannot be trusted, or refused a command.",
    PROGRAM_FAULT: "A bug in forkvm. Please report it.",
    TIMED_OUT: "The --timeout of --wait expired. The job continues.",
}
