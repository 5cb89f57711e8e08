"""The command `forkvm gc`: removes abandoned staging, and reports what it keeps or cannot remove."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import click

from tasks.copier.errors import ForkError
from tasks.copier.roots import normal_path
from tasks.copier.staging.gc import Finding, collect
from worker.commands.options import FAILED, absolute, as_json, connect
from worker.commands.unexpected_errors import is_redis_fault
from worker.settings import NoBroker, Settings, read_settings
from worker.terminal import answer, answer_json, say

if TYPE_CHECKING:
    from worker.client import Client


@click.command()
@click.argument("directories", nargs=-1)
@as_json
def gc(directories: tuple[str, ...], as_json: bool) -> None:
    """Remove the staging that a dead machine left below DIRECTORIES (default: the roots), never a live fork's.

    What is in use or not proved to be forkvm's own is kept. The exit code is 1 where something could not be searched,
    read or removed; the search goes on behind it.
    """
    settings = read_settings()
    searched = [normal_path(absolute(directory), "directory") for directory in directories] or list(settings.roots)
    if not searched:
        raise click.UsageError("nothing to search: name directories, or set FORKVM_ROOTS")
    findings = list(_findings(searched, settings))
    counts = Counter(finding.verdict for finding in findings)
    if as_json:
        answer_json([vars(finding) for finding in findings])
    else:
        for finding in findings:
            fork = f" (fork {finding.fork_id})" if finding.fork_id else ""
            answer(f"{finding.verdict} {finding.path}{fork}: {finding.reason}")
        failed = f", {counts['failed']} failed" if counts["failed"] else ""
        answer(f"{counts['removed']} removed, {counts['kept']} kept{failed}")
    if counts["failed"]:
        raise click.exceptions.Exit(FAILED)


def _findings(searched: list[str], settings: Settings) -> Iterator[Finding]:
    is_live = _asking(settings)
    for directory in searched:
        try:
            yield from collect(directory, is_live)
        except ForkError as error:
            yield Finding(directory, "", "failed", error.message)


def _asking(settings: Settings) -> Callable[[str], bool | None]:
    """Asks the queue whether it has still to deliver a fork; connects when it is first asked."""
    clients: list[Client | None] = []

    def is_live(fork_id: str) -> bool | None:
        try:
            if not clients:
                clients.append(connect(settings))
            return None if clients[0] is None else clients[0].results.is_open(fork_id)
        except NoBroker as error:
            reason = str(error)
        except Exception as error:
            if not is_redis_fault(error):
                raise
            reason = f"Redis: {error}"
        say(reason)
        clients[:] = [None]
        return None

    return is_live
