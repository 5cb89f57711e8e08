"""The command `forkvm gc`: removes abandoned staging, and reports what it keeps or cannot remove."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import click

from tasks.copier.errors import ForkError
from worker.commands.errors import is_redis_error
from worker.commands.help import command
from worker.commands.options import PATH, absolute, as_json, connect
from worker.exit_codes import FAILED
from worker.settings import NoBroker, Settings, read_settings
from worker.terminal.printing import print_json, print_line, print_message

if TYPE_CHECKING:
    from tasks.copier.staging.gc import Finding
    from worker.client import Client


@command(
    example="forkvm gc /guests",
    done="Everything was searched.",
    failed="Something could not be searched, read or removed. The rest was searched.",
)
@click.argument("directories", nargs=-1, type=PATH)
@as_json
def gc(directories: tuple[str, ...], as_json: bool) -> None:
    """Remove abandoned staging directories.

    Searches DIRECTORIES (default: FORKVM_ROOTS) for staging directories of forks whose process or machine died. A
    staging directory that is in use, or that may not be forkvm's own, is kept. If Redis cannot be reached, those of
    queued forks are kept.
    """
    from tasks.copier.roots import normal_path

    settings = read_settings()
    searched = [normal_path(absolute(directory), "directory") for directory in directories] or list(settings.roots)
    if not searched:
        raise click.UsageError("nothing to search: name DIRECTORIES, or set FORKVM_ROOTS")
    findings = list(_findings(searched, settings))
    counts = Counter(finding.verdict for finding in findings)
    if as_json:
        print_json([vars(finding) for finding in findings])
    else:
        for finding in findings:
            fork = f" (fork {finding.fork_id})" if finding.fork_id else ""
            print_line(f"{finding.verdict} {finding.path}{fork}: {finding.reason}")
        failed = f", {counts['failed']} failed" if counts["failed"] else ""
        print_line(f"{counts['removed']} removed, {counts['kept']} kept{failed}")
    if counts["failed"]:
        raise click.exceptions.Exit(FAILED)


def _findings(searched: list[str], settings: Settings) -> Iterator[Finding]:
    from tasks.copier.staging.gc import Finding, collect

    is_live = _liveness(settings)
    for directory in searched:
        try:
            yield from collect(directory, is_live)
        except ForkError as error:
            yield Finding(directory, "", "failed", error.message)


def _liveness(settings: Settings) -> Callable[[str], bool | None]:
    """A function that says whether a fork has started and not ended; None if Redis cannot be asked.

    It connects when it is called first.
    """
    clients: list[Client | None] = []

    def is_live(fork_id: str) -> bool | None:
        try:
            if not clients:
                clients.append(connect(settings))
            return None if clients[0] is None else clients[0].results.is_open(fork_id)
        except NoBroker as error:
            reason = str(error)
        except Exception as error:
            if not is_redis_error(error):
                raise
            reason = f"Redis: {error}"
        print_message(reason)
        clients[:] = [None]
        return None

    return is_live
