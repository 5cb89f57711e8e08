"""What a worker checks when it starts: it does not start where no fork can succeed, and logs what else is not well."""

from __future__ import annotations

import os

from redis.exceptions import RedisError

from tasks.store.redis_errors import cause
from tasks.store.results import Results
from worker.checks.check import Check
from worker.checks.host import KERNEL, host_checks
from worker.checks.redis import distance_checks, server_checks
from worker.checks.redis_rights import rights_check
from worker.checks.settings import settings_checks
from worker.settings import Settings
from worker.terminal.printing import printable

#: PINGs that are timed at a start, which they delay.
_PINGS = 5


class Unusable(Exception):
    """No fork can succeed on this host with these settings. The text says why, and how to fix it."""


def check_host(settings: Settings) -> list[str]:
    """Check this host, its roots and the settings; returns a warning for each problem. Raises Unusable."""
    checks = [*settings_checks(settings), *host_checks(settings.roots)]
    kernel = [check for check in checks if check.verdict == "bad" and check.subject.startswith(KERNEL)]
    # Another filesystem may be mounted below a root whose own cannot be used.
    if kernel or not any(map(_can_open, settings.roots)):
        roots = [check for check in checks if check.subject in {f"root {root}" for root in settings.roots}]
        raise Unusable("; ".join(map(_line, kernel or roots)))
    return [_line(check) for check in checks if check.verdict != "ok"]


def check_redis(settings: Settings, results: Results) -> list[str]:
    """Check the Redis of the results; returns a warning for each problem that was found before it went away.

    A worker waits for one that is away. Celery reports that of the broker only.
    """
    subject = f"Redis {settings.backend.shown()}"
    redis, checks, lines = results.redis, list[Check](), list[str]()
    try:
        checks += server_checks(subject, redis)
        checks.append(rights_check(subject, redis))
        checks += distance_checks(subject, redis, _PINGS)
    except (RedisError, OSError) as error:
        if settings.backend != settings.broker:
            lines.append(f"the worker waits for the result backend at {settings.backend.shown()}: {cause(error)}")
    return [_line(check) for check in checks if check.verdict != "ok"] + lines


def _can_open(root: str) -> bool:
    try:
        os.close(os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def _line(check: Check) -> str:
    return printable(f"{check.subject}: {check.found}; {check.fix}")
