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
    NoPermissionError,
    NoScriptError,
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
#: What redis-py raises while Redis is away, is starting, or is not a master, and when its scripts were removed. LOADING
#: is a ConnectionError.
_PASSING = (
    *(ConnectionError, TimeoutError, ReadOnlyError, TryAgainError, ClusterDownError, MasterDownError),
    NoScriptError,
)
#: The same as codes in the text, where redis-py raises a plain ResponseError: from a script, where Redis before 7 puts
#: the line of the script before the code; and in MULTI, where redis-py puts the command before it. EXECABORT: Redis
#: refused a command in MULTI.
_PASSING_CODE = re.compile(
    r"\b(READONLY|NOREPLICAS|MISCONF|LOADING|BUSY|TRYAGAIN|CLUSTERDOWN|MASTERDOWN|UNBLOCKED|EXECABORT)\b"
)

#: The same for a command that the user has no right to, in a script, where no release of Redis gives it a code; and for
#: one that an administrator has renamed. What follows the command are its arguments.
_REFUSED = re.compile(
    r"NOPERM|ACL failure in script|The user executing the script|has no permissions|(?i:unknown (?:redis )?command)"
)
_ARGUMENTS = re.compile(r", with args beginning with.*", re.DOTALL)

#: What redis-py puts before the error of a command in a pipeline: the command and the beginning of its arguments, which
#: can be results and names of a guest's files.
_COMMAND = re.compile(r"^Command # \d+ \(.*\) of pipeline caused error: ", re.DOTALL)


def cause(error: BaseException) -> str:
    """The text of an error for a log or a message, without the arguments of a command.

    If Redis refuses a command to its user, it names the command, or says that it was the key.
    """
    text = _ARGUMENTS.sub("", _COMMAND.sub("", str(error)))
    if is_refused(error):
        text += "; grant the rights that SECURITY.md lists: `forkvm doctor` names those that are missing"
    return text


def is_refused(error: BaseException) -> bool:
    """Whether Redis refuses a command to its user: by an ACL, or since it has another name there."""
    answers = ResponseError, OperationalError  # the latter is kombu's, with the same text
    return isinstance(error, NoPermissionError) or (isinstance(error, answers) and bool(_REFUSED.search(str(error))))


def is_passing(error: BaseException) -> bool:
    """Whether an error of Redis or of the connection is temporary: a failover, a restart, a full disk, a missing right.

    A right is missing by a mistake in an ACL, which an administrator corrects. The jobs wait for that, as for a Redis
    that is away. A full Redis (OOM) is not among them: each caller decides whether to wait for it.
    """
    if isinstance(error, ResponseError):
        return isinstance(error, _PASSING) or bool(_PASSING_CODE.search(str(error))) or is_refused(error)
    return isinstance(error, (*_PASSING, OperationalError))


def wait_out(call: Callable[[], T], *also: type[RedisError]) -> T:
    """Call until Redis answers. Waits after a temporary error and one of the classes `also`; raises any other."""
    while True:
        try:
            return call()
        except (RedisError, OperationalError, OSError) as error:
            if not is_passing(error) and not isinstance(error, also):
                raise
            what = "refuses a command" if is_refused(error) else "does not answer"
            log.warning("Redis %s; trying again: %s", what, cause(error))
            time.sleep(_PAUSE_SECONDS)
