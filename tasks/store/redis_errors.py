"""Which errors of Redis pass by themselves, and how to wait until they have passed."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from typing import TypeVar

from kombu.exceptions import OperationalError
from redis.exceptions import (
    ClusterDownError,
    ConnectionError,
    MasterDownError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TimeoutError,
    TryAgainError,
)

T = TypeVar("T")

log = logging.getLogger(__name__)

#: Pause between two tries while Redis is away, in seconds.
_PAUSE_SECONDS = 0.5
#: What redis-py raises while Redis is away, starts, or is no master. LOADING is a ConnectionError.
_PASSING = (ConnectionError, TimeoutError, ReadOnlyError, TryAgainError, ClusterDownError, MasterDownError)
#: The same as codes in the text, where redis-py has no class for it: from a script, where Redis before 7 puts a place
#: before the code, and in MULTI, where redis-py puts the command before it. EXECABORT: a command in MULTI was refused.
_PASSING_CODE = re.compile(
    r"\b(READONLY|NOREPLICAS|MISCONF|LOADING|BUSY|TRYAGAIN|CLUSTERDOWN|MASTERDOWN|UNBLOCKED|EXECABORT)\b"
)

#: What redis-py puts before the error of a command of a pipeline: the command and the beginning of its arguments,
#: which are results and names of a guest's files.
_COMMAND = re.compile(r"^Command # \d+ \(.*\) of pipeline caused error: ", re.DOTALL)


def cause(error: BaseException) -> str:
    """What Redis or the connection said, for a log or a message: without the command and its arguments."""
    return _COMMAND.sub("", str(error))


def is_passing(error: BaseException) -> bool:
    """Whether Redis, or the connection to it, failed for a while only: a failover, a restart, a full disk.

    A full Redis (OOM) is not among them: callers decide whether they wait for it.
    """
    if isinstance(error, ResponseError):
        return isinstance(error, _PASSING) or bool(_PASSING_CODE.search(str(error)))
    return isinstance(error, (*_PASSING, OperationalError))


def wait_out(call: Callable[[], T], *also: type[RedisError]) -> T:
    """Call until Redis answers; errors that pass, and those of the classes `also`, are waited out."""
    while True:
        try:
            return call()
        except (RedisError, OperationalError, OSError) as error:
            if not is_passing(error) and not isinstance(error, also):
                raise
            log.warning("Redis does not answer; trying again: %s", cause(error))
            time.sleep(_PAUSE_SECONDS)
