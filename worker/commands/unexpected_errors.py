"""Errors that no command expects, as one line instead of a traceback."""

from __future__ import annotations

import errno
import os
import sys
import traceback

from worker.commands.options import FAILED, NO_BROKER

#: Exit code for a fault in this program, as sysexits.h has it.
FAULT = 70


def is_redis_fault(error: Exception) -> bool:
    """Whether an error is Redis's or its connection's. Redis is not imported for commands that do without it."""
    module = sys.modules.get("redis.exceptions")
    return module is not None and isinstance(error, module.RedisError)


def exit_code(error: Exception) -> int:
    """The exit code for an error that no command expects."""
    if is_redis_fault(error):
        return NO_BROKER
    return FAILED if isinstance(error, OSError) and error.filename is not None else FAULT


def unexpected(error: Exception) -> str:
    """What is said of an error that no command expects."""
    if is_redis_fault(error):
        return f"Redis: {error}"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {error.strerror} ({errno.errorcode.get(error.errno or 0, error.errno)})"
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return f"unexpected {type(error).__name__}{where}: {error}; this is a fault in forkvm, please report it"
