"""The command `forkvm doctor`: what this host can do, what is wrong, and the mend."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

import click

from worker.checks.host import Check, Verdict, host_checks
from worker.commands.options import FAILED, NO_BROKER, as_json
from worker.settings import NoBroker, Settings, read_settings
from worker.terminal import answer_json, printable

_STYLES: dict[Verdict, str] = {"ok": "green", "warn": "yellow", "bad": "bold red"}


@click.command()
@as_json
def doctor(as_json: bool) -> None:
    """What this host can do: its kernel, roots and Redis; what is wrong, and the mend."""
    settings = read_settings()
    checks = list(host_checks(settings.roots))
    code = 0
    try:
        for check in _of_redis(settings):  # what was found before Redis went away is told, too
            checks.append(check)
    except NoBroker as error:
        checks.append(Check("Redis", "bad", str(error), "start it, or set FORKVM_BROKER_URL and FORKVM_RESULT_BACKEND"))
        code = NO_BROKER
    verdict = _worst(checks)
    if as_json:
        answer_json({"verdict": verdict, "checks": [asdict(check) for check in checks]})
    else:
        _show(checks)
    if code or verdict == "bad":
        raise click.exceptions.Exit(code or FAILED)


def _of_redis(settings: Settings) -> Iterator[Check]:
    from worker.checks.redis import redis_checks  # and Celery with it

    return redis_checks(settings)


def _worst(checks: list[Check]) -> Verdict:
    return max((check.verdict for check in checks), key=list(_STYLES).index)


def _show(checks: list[Check]) -> None:
    """A line for each check, and one below it for what mends it."""
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=True, highlight=False)
    for check in checks:
        verdict = (f"{check.verdict:<5}", _STYLES[check.verdict])
        console.print(Text.assemble(verdict, printable(f"{check.subject}: {check.found}")))
        if check.fix:
            console.print(Text(printable(f"     -> {check.fix}")))
