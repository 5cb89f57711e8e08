"""Errors that no command expects, as one line instead of a traceback."""

from __future__ import annotations

import sys
import traceback

#: Exit code for a fault in this program, as sysexits.h has it.
FAULT = 70


def is_redis_fault(error: Exception) -> bool:
    """Whether an error is Redis's or its connection's. Redis is not imported for commands that do without it."""
    module = sys.modules.get("redis.exceptions")
    return module is not None and isinstance(error, module.RedisError)


def unexpected(error: Exception) -> str:
    """What is said of an error that no command expects."""
    if is_redis_fault(error):
        return f"Redis: {error}"
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return f"unexpected {type(error).__name__}{where}: {error}; this is a fault in forkvm, please report it"
