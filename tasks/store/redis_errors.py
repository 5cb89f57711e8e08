"""Which errors of Redis are temporary, and how to wait until they are over."""

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
#: What redis-py raises while Redis is away, is starting, or is not a master. LOADING is a ConnectionError.
_PASSING = (ConnectionError, TimeoutError, ReadOnlyError, TryAgainError, ClusterDownError, MasterDownError)
#: The same as codes in the text, where redis-py raises a plain ResponseError: from a script, where Redis before 7 puts
#: the line of the script before the code; and in MULTI, where redis-py puts the command before it. EXECABORT: Redis
#: refused a command in MULTI.
_PASSING_CODE = re.compile(
    r"\b(READONLY|NOREPLICAS|MISCONF|LOADING|BUSY|TRYAGAIN|CLUSTERDOWN|MASTERDOWN|UNBLOCKED|EXECABORT)\b"
)

#: What redis-py puts before the error of a command in a pipeline: the command and the beginning of its arguments, which
#: can be results and names of a guest's files.
_COMMAND = re.compile(r"^Command # \d+ \(.*\) of pipeline caused error: ", re.DOTALL)


def cause(error: BaseException) -> str:
    """The text of an error for a log or a message, without the command and its arguments."""
    return _COMMAND.sub("", str(error))


def is_passing(error: BaseException) -> bool:
    """Whether an error of Redis or of the connection is temporary: a failover, a restart, a full disk.

    A full Redis (OOM) is not among them: each caller decides whether to wait for it.
    """
    if isinstance(error, ResponseError):
        return isinstance(error, _PASSING) or bool(_PASSING_CODE.search(str(error)))
    return isinstance(error, (*_PASSING, OperationalError))


def wait_out(call: Callable[[], T], *also: type[RedisError]) -> T:
    """Call until Redis answers. Waits after a temporary error and one of the classes `also`; raises any other."""
    while True:
        try:
            return call()
        except (RedisError, OperationalError, OSError) as error:
            if not is_passing(error) and not isinstance(error, also):
                raise
            log.warning("Redis does not answer; trying again: %s", cause(error))
            time.sleep(_PAUSE_SECONDS)
