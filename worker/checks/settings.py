"""The checks of the settings: variables that mean nothing, and settings without effect or against each other."""

from __future__ import annotations

import os
from collections.abc import Iterator

from worker.checks.check import Check
from worker.cpus import available_cpus
from worker.redis_url import SENTINEL
from worker.settings import Settings, unknown_settings

#: More pool processes for each CPU only wait for each other.
_PROCESSES_PER_CPU = 8


def variable_checks() -> Iterator[Check]:
    """A warning for each variable `FORKVM_*` that is not a setting."""
    for warning in unknown_settings():
        name, _, found = warning.partition(" ")
        yield Check(f"variable {name}", "warn", found, "correct or remove it")


def settings_checks(settings: Settings) -> Iterator[Check]:
    """A warning for each setting that has no effect, or that another one contradicts."""
    yield from _roots(settings.roots)
    yield from _redis(settings)
    processes, cpus = settings.concurrency, available_cpus()
    if processes is not None and processes > _PROCESSES_PER_CPU * cpus:
        found = f"{processes} pool processes for {cpus} CPUs"
        yield Check("setting FORKVM_CONCURRENCY", "warn", found, "lower it, or leave it out")


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
