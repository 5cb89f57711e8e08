"""What a command prints for an error that ends it, and its exit code: one line instead of a traceback."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Callable

import click

from tasks.copier.errors import Code, ForkError, describe
from worker.commands.output import print_usage_error
from worker.exit_codes import BAD_CALL, DONE, FAILED, INTERRUPTED, NO_BROKER, PROGRAM_FAULT
from worker.settings import BadSettings, NoBroker
from worker.terminal.printing import print_message


def run(command: Callable[[], int | None]) -> int:
    """Run a command; its exit code. An error is printed on stderr."""
    try:
        return command() or DONE
    except click.ClickException as error:
        print_usage_error(error)
        return BAD_CALL
    except click.Abort:  # Ctrl-C
        return INTERRUPTED
    except BadSettings as error:
        print_message(str(error))
        return BAD_CALL
    except NoBroker as error:
        print_message(str(error))
        return NO_BROKER
    except ForkError as error:
        print_message(describe(error.record()))
        return BAD_CALL if error.code is Code.INVALID_REQUEST else FAILED
    except Exception as error:
        text, code = _unexpected(error)
        print_message(text)
        return code


def is_redis_error(error: Exception) -> bool:
    """Whether redis-py raised the error. Redis-py is not imported for it: a command may run without it."""
    module = sys.modules.get("redis.exceptions")
    return module is not None and isinstance(error, module.RedisError)


def _unexpected(error: Exception) -> tuple[str, int]:
    """The text and the exit code for an error that no command handles."""
    if is_redis_error(error):
        return f"Redis: {error}", NO_BROKER
    if isinstance(error, OSError) and error.filename is not None:
        name = errno.errorcode.get(error.errno or 0, error.errno)
        return f"{os.fsdecode(error.filename)}: {error.strerror} ({name})", FAILED
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    text = f"unexpected {type(error).__name__}{where}: {error}; this is a bug in forkvm, please report it"
    return text, PROGRAM_FAULT
