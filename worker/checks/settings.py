"""The checks of the settings: variables that mean nothing, and settings without effect or against each other.

No check creates anything.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from worker.checks.check import Check
from worker.checks.io_scheduler import priority_checks
from worker.cpus import available_cpus
from worker.redis_url import SENTINEL
from worker.settings import Settings, replaced_secrets, unknown_settings

#: More pool processes for each CPU only wait for each other.
_PROCESSES_PER_CPU = 8


def variable_checks() -> Iterator[Check]:
    """A warning for each variable `FORKVM_*` that is not a setting, or that replaces a secret file."""
    for warning in unknown_settings():
        name, _, found = warning.partition(" ")
        yield Check(f"variable {name}", "warn", found, "correct or remove it")
    for name in replaced_secrets():
        yield Check(f"variable {name}", "warn", "replaces the secret file of that name", "remove one of the two")


def settings_checks(settings: Settings) -> Iterator[Check]:
    """A problem for each setting that has no effect, cannot be used, or that another one contradicts."""
    yield from _roots(settings.roots)
    yield from _redis(settings)
    yield from _times(settings)
    yield from _copy_rate(settings)
    yield from _heartbeat_file(settings.heartbeat_file)
    yield from priority_checks(settings.io_priority, settings.roots)
    processes, cpus = settings.concurrency, available_cpus()
    if processes is not None and processes > _PROCESSES_PER_CPU * cpus:
        found = f"{processes} pool processes for {cpus} CPUs"
        yield Check("setting FORKVM_CONCURRENCY", "warn", found, "lower it, or leave it out")


def _times(settings: Settings) -> Iterator[Check]:
    """Times that other times contradict."""
    timeout, limit, expires = settings.visibility_timeout, settings.task_time_limit, settings.result_expires
    if timeout > limit:
        found = f"{timeout} s, longer than a task may take (FORKVM_TASK_TIME_LIMIT, {limit} s)"
        why = "the messages of a dead worker wait so long; a live one renews them every 2 s, so lower it"
        yield Check("setting FORKVM_VISIBILITY_TIMEOUT", "warn", found, why)
    if timeout >= expires:
        found = f"{expires} s, not longer than FORKVM_VISIBILITY_TIMEOUT ({timeout} s)"
        why = "a message that is delivered again then finds no result and makes its fork again: raise it"
        yield Check("setting FORKVM_RESULT_EXPIRES", "warn", found, why)


def _copy_rate(settings: Settings) -> Iterator[Check]:
    """A bound that no process can keep, that the time limit contradicts, or that another one replaces."""
    rate, pace = settings.copy_rate, settings.copy_pace
    problem = pace.problem() if rate or settings.runtime_dir else ""
    if problem:
        effect = "each process has FORKVM_COPY_RATE for itself" if rate else "forkvm copy-rate has no effect"
        found = f"{pace.directory} cannot be used: {problem}; {effect}"
        yield Check("setting FORKVM_RUNTIME_DIR", "warn", found, "name a directory that this user may write to")
    if rate is None:
        return
    seconds = max(settings.chunk_bytes, settings.inline_bytes) * (settings.concurrency or available_cpus()) / rate
    if seconds > settings.task_time_limit:
        found = f"a chunk takes up to {seconds:.0f} s, and is ended after FORKVM_TASK_TIME_LIMIT, each time again"
        fix = "raise the rate or the limit, or lower FORKVM_CHUNK_BYTES and FORKVM_INLINE_BYTES"
        yield Check("setting FORKVM_COPY_RATE", "warn", found, fix)
    if not problem and pace.is_set_at_run_time() and pace.current() != rate:
        found = f"replaced at run time by {pace.current() or 'no bound'}"
        yield Check("setting FORKVM_COPY_RATE", "warn", found, f"forkvm copy-rate {rate}, or change the setting")


def _heartbeat_file(path: str) -> Iterator[Check]:
    """Whether a worker can write the file; it does not start otherwise."""
    if not path:
        return
    parent = os.path.dirname(path) or "."
    if os.path.lexists(path):
        problem = "" if os.access(path, os.W_OK) else "it is not writable"
    elif os.path.isdir(parent):
        problem = "" if os.access(parent, os.W_OK | os.X_OK) else f"{parent} is not writable"
    else:
        problem = f"{parent} does not exist"
    if problem:
        found = f"{path} cannot be written by uid {os.geteuid()}: {problem}; a worker does not start"
        yield Check("setting FORKVM_HEARTBEAT_FILE", "bad", found, "name a file in a directory that is writable")


def _roots(roots: tuple[str, ...]) -> Iterator[Check]:
    for number, root in enumerate(roots):
        inside = [other for other in roots if other != root and os.path.commonpath([root, other]) == other]
        if inside or root in roots[:number]:
            found = f"{root} is in it twice" if not inside else f"{root} is inside {inside[0]}, which includes it"
            yield Check("setting FORKVM_ROOTS", "warn", found, "remove the superfluous one")


def _redis(settings: Settings) -> Iterator[Check]:
    urls = (settings.broker, settings.backend)
    is_tls = any(url.is_tls for url in urls)
    has_sentinel = any(url.scheme == SENTINEL for url in urls)
    without_effect = {
        "REDIS_CA": settings.redis_ca and not is_tls and "no URL of Redis begins with rediss://",
        "SENTINEL_MASTER": settings.sentinel_master and not has_sentinel and "no URL of Redis begins with sentinel://",
        "SENTINEL_PASSWORD": (
            settings.sentinel_password and not has_sentinel and "no URL of Redis begins with sentinel://"
        ),
        "REDIS_PASSWORD": (
            settings.redis_password and all(url.password for url in urls) and "the URLs have passwords of their own"
        ),
    }
    for name, why in without_effect.items():
        if why:
            yield Check(f"setting FORKVM_{name}", "warn", f"without effect: {why}", "remove it, or correct the URL")
