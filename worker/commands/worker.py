"""The commands for the workers of this host: `forkvm worker`, `forkvm demo` and `forkvm copy-rate`."""

from __future__ import annotations

import os
import sys

import click

from tasks.copier.copy_rate import LEAST_RATE
from worker.commands.help import command
from worker.commands.options import PATH, as_json, with_domain
from worker.exit_codes import DONE, FAILED, INTERRUPTED, NO_BROKER
from worker.settings import LOG_LEVELS, NO_ROOTS, read_settings
from worker.terminal.printing import print_json, print_line, print_message


@command(
    example="FORKVM_ROOTS=/guests forkvm worker --concurrency 4",
    done="The worker was stopped by SIGTERM.",
    failed="No fork can succeed on this host (see forkvm doctor), or Celery ended with an error.",
    codes=(NO_BROKER,),
)
@click.option("--domain", metavar="NAME", help="Domain to serve. Default: FORKVM_DOMAIN.")
@click.option(
    "--concurrency",
    type=click.IntRange(1),
    metavar="N",
    help="Number of pool processes. Default: FORKVM_CONCURRENCY, else the number of CPUs that the worker may use.",
)
@click.option(
    "--loglevel",
    type=click.Choice(LOG_LEVELS, case_sensitive=False),
    help="Lines below this level are not logged. Default: FORKVM_LOG_LEVEL, else INFO.",
)
def worker(domain: str | None, concurrency: int | None, loglevel: str | None) -> None:
    """Run a worker for the queue of a domain.

    It checks this host first, as forkvm doctor does: what makes every fork fail stops it, anything else is one line in
    its log. SIGTERM stops the worker after it has finished its running tasks.
    """
    settings = with_domain(read_settings(), domain)
    if not settings.roots:
        raise click.UsageError(NO_ROOTS)
    if domain is not None:
        os.environ["FORKVM_DOMAIN"] = domain
    if loglevel is not None:
        os.environ["FORKVM_LOG_LEVEL"] = loglevel
    from celery import signals

    from worker.app import app  # reads FORKVM_DOMAIN and FORKVM_LOG_LEVEL

    ended_by: list[str] = []
    signals.worker_shutting_down.connect(lambda sig, **_: ended_by.append(sig), weak=False)
    # Not through celery.bin, which imports each command of Celery and of its plugins: that takes as long as all else.
    started = app.Worker(
        queues=[settings.queue],
        loglevel="INFO",
        concurrency=concurrency,
        no_color=bool(os.environ.get("NO_COLOR")),
    )
    started.start()
    # Celery's own code after Ctrl-C is that of an error.
    sys.exit(INTERRUPTED if "SIGINT" in ended_by else started.exitcode or DONE)


@command(example="forkvm demo --dir /guests", failed="The demo could not be run, or a step of it failed.")
@click.option(
    "--dir",
    "directory",
    type=PATH,
    metavar="DIR",
    help="Directory for the demo's guests. Default: a new XFS filesystem as root, else /tmp.",
)
def demo(directory: str | None) -> None:
    """Show the whole system on this machine.

    Starts a Redis and a worker, makes a guest directory, forks it, verifies the fork, and removes everything again.
    """
    from worker.commands.demo import run_demo

    run_demo(directory)


_NONE = "none"
#: More do not fit into the file of the copy rate.
_MOST_DIGITS = 18


class _Rate(click.ParamType[int]):
    """A number of bytes, or `none`. Its value is the number, or 0."""

    name = "rate"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The value of a word. Raises BadParameter."""
        if value == _NONE:
            return 0
        text = str(value)
        if not text.isdecimal() or len(text) > _MOST_DIGITS or int(text) < LEAST_RATE:
            self.fail(f"give {_NONE}, or at least {LEAST_RATE} bytes per second", param, ctx)
        return int(text)


@command(
    example="forkvm copy-rate 100000000",
    done="The copy rate was shown or set.",
    failed="The file of the copy rate cannot be written.",
)
@click.argument("rate", metavar="[BYTES|none]", required=False, type=_Rate())
@as_json
def copy_rate(rate: int | None, as_json: bool) -> None:
    """Show or set how many bytes per second this host copies.

    The bound is for all workers and local forks of the host together. It holds for running copies too, until it is set
    again or the host restarts, and replaces FORKVM_COPY_RATE. Reflinks are not slowed down.
    """
    pace = read_settings().copy_pace
    if rate is not None:
        try:
            pace.set(rate or None)
        except OSError as error:
            print_message(f"{pace.directory}: the copy rate cannot be set: {error.strerror}")
            raise click.exceptions.Exit(FAILED) from None
    bound, at_run_time = pace.current(), pace.is_set_at_run_time()
    if as_json:
        print_json({"copy_rate": bound, "at_run_time": at_run_time})
        return
    source = "set at run time" if at_run_time else "FORKVM_COPY_RATE" if bound else "no bound is set"
    print_line(f"{_NONE if bound is None else bound} ({source})")
