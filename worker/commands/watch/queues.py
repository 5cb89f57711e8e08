"""The commands `forkvm queues` and `forkvm top`."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

import click

from worker.commands.help import command
from worker.commands.options import Seconds, as_json, connect, with_domain
from worker.exit_codes import NO_BROKER
from worker.settings import NoBroker, Settings, read_settings
from worker.terminal.printing import print_json, print_message
from worker.terminal.streams import stdout_failed

if TYPE_CHECKING:
    from rich.console import ConsoleDimensions, RenderableType

    from worker.client import Client
    from worker.overview import Overview, Worker

_WIDTH_OF_A_PIPE = 10_000

_domain = click.option("--domain", metavar="NAME", help="Domain to show. Default: FORKVM_DOMAIN.")


@command(example="forkvm queues --domain nvme-a", done="The domain was shown.", codes=(NO_BROKER,))
@_domain
@as_json
def queues(domain: str | None, as_json: bool) -> None:
    """Show the queues, jobs and workers of a domain.

    Of each queue: the messages that wait, those that workers have taken, and how long the oldest waits, if its client
    sent the header `sent_at`. A worker that does not answer within a second is shown for an hour after its last
    heartbeat.
    """
    overview = connect(with_domain(read_settings(), domain)).overview()
    if as_json:
        print_json(overview.to_data())
        return
    from rich.console import Console

    from worker.commands.watch.tables import tables

    # A pipe has no width, and what reads from it needs whole names.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH_OF_A_PIPE)
    console.print(tables(overview, console.width))
    if not overview.answering:
        print_message(f"no worker of {overview.queue} answers")
    for worker in overview.silent:
        print_message(_about(worker))


def _about(worker: Worker) -> str:
    """The line about a worker that does not answer."""
    from worker.commands.watch.tables import span

    ago = f"{span(worker.heartbeat_seconds)} ago"
    if worker.ending:
        return f"worker {worker.name} was told to end {ago}, and has not reported yet that it has ended"
    return f"worker {worker.name} does not answer; its last heartbeat was {ago}"


@command(example="forkvm top --interval 5", done="It was ended with Ctrl-C.", codes=(NO_BROKER,))
@_domain
@click.option(
    "--interval",
    type=Seconds(1),
    default=2,
    show_default=True,
    metavar="SECONDS",
    help="Time from one reading to the next.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document a line for each reading.")
def top(domain: str | None, interval: float, as_json: bool) -> None:
    """Show a domain like `forkvm queues`, again and again.

    Ctrl-C ends it. While Redis is away, the last reading stays, with the reason.
    """
    settings = with_domain(read_settings(), domain)
    if not as_json and not sys.stdout.isatty():
        raise click.UsageError("stdout is not a terminal; use --json, or forkvm queues")
    client = connect(settings)
    try:
        if as_json:
            _print_readings(client, interval)
        else:
            _show_readings(settings, client, interval)
    except KeyboardInterrupt:
        return


def _print_readings(client: Client, interval: float) -> None:
    while not stdout_failed():
        began = time.monotonic()
        print_json(client.overview().to_data())
        time.sleep(max(0.0, began + interval - time.monotonic()))


def _show_readings(settings: Settings, client: Client | None, interval: float) -> None:
    from rich.live import Live

    overview = None
    with Live(screen=True, auto_refresh=False) as live:
        while True:
            began = time.monotonic()
            reason = ""
            try:
                client = client or connect(settings)
                overview = client.overview()
            except NoBroker as error:
                client, reason = None, str(error)
            live.update(_screen(settings.queue, overview, reason, live.console.size), refresh=True)
            time.sleep(max(0.0, began + interval - time.monotonic()))


def _screen(queue: str, overview: Overview | None, reason: str, size: ConsoleDimensions) -> RenderableType:
    """What the terminal shows: the title, and the last overview, cut to the terminal's size."""
    from rich.console import Group

    from worker.commands.watch.tables import tables, title

    head = title(queue, reason)
    return head if overview is None else Group(head, tables(overview, size.width, size.height - 1))
