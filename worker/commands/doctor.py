"""The command `forkvm doctor`: checks this host and its Redis, and shows how to fix each problem."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from worker.commands.help import command
from worker.commands.options import as_json
from worker.exit_codes import DONE, FAILED, NO_BROKER
from worker.settings import NoBroker, Settings, read_settings
from worker.terminal.printing import print_json, printable

if TYPE_CHECKING:
    from worker.checks.check import Check, Verdict

_STYLES: dict[Verdict, str] = {"ok": "green", "warn": "yellow", "bad": "bold red"}


@command(
    example="FORKVM_ROOTS=/guests forkvm doctor",
    done="No check is bad. There may be warnings.",
    failed="At least one check is bad.",
    codes=(NO_BROKER,),
)
@as_json
def doctor(as_json: bool) -> None:
    """Check this host, its roots and its Redis.

    Each check is ok, a warning or bad. A problem is shown with its fix.
    """
    from worker.checks.check import Check
    from worker.checks.host import host_checks, lock_checks
    from worker.checks.settings import settings_checks, variable_checks

    settings = read_settings()
    checks = [*variable_checks(), *settings_checks(settings), *host_checks(settings.roots)]
    checks += lock_checks(settings.roots)
    code = DONE
    try:
        for check in _redis_checks(settings):  # keeps the checks that were made before Redis went away
            checks.append(check)
    except NoBroker as error:
        checks.append(Check("Redis", "bad", str(error), "start it, or set FORKVM_BROKER_URL and FORKVM_RESULT_BACKEND"))
        code = NO_BROKER
    verdict = _worst(checks)
    if as_json:
        print_json({"verdict": verdict, "checks": [asdict(check) for check in checks]})
    else:
        _show(checks)
    if code or verdict == "bad":
        raise click.exceptions.Exit(code or FAILED)


def _redis_checks(settings: Settings) -> Iterator[Check]:
    from worker.checks.redis import redis_checks  # imports Celery

    return redis_checks(settings)


def _worst(checks: list[Check]) -> Verdict:
    return max((check.verdict for check in checks), key=list(_STYLES).index)


def _show(checks: list[Check]) -> None:
    """Print a line for each check, and its fix on the next line."""
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=True, highlight=False)
    for check in checks:
        verdict = (f"{check.verdict:<5}", _STYLES[check.verdict])
        console.print(Text.assemble(verdict, printable(f"{check.subject}: {check.found}")))
        if check.fix:
            console.print(Text(printable(f"     -> {check.fix}")))
