"""The commands that start a worker: `forkvm worker` and `forkvm demo`."""

from __future__ import annotations

import os
import sys

import click

from worker.commands.help import command
from worker.commands.options import PATH, with_domain
from worker.exit_codes import DONE, NO_BROKER
from worker.settings import NO_ROOTS, read_settings


@command(
    example="FORKVM_ROOTS=/guests forkvm worker --concurrency 4",
    done="The worker was stopped by a signal.",
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
    type=click.Choice(["DEBUG", "INFO", "WARNING", "ERROR"], case_sensitive=False),
    default="INFO",
    show_default=True,
    help="Lines below this level are not logged.",
)
def worker(domain: str | None, concurrency: int | None, loglevel: str) -> None:
    """Run a worker for the queue of a domain.

    It checks this host first, as forkvm doctor does: what makes every fork fail stops it, anything else is one line in
    its log. SIGTERM stops the worker after it has finished its running tasks.
    """
    settings = with_domain(read_settings(), domain)
    if not settings.roots:
        raise click.UsageError(NO_ROOTS)
    if domain is not None:
        os.environ["FORKVM_DOMAIN"] = domain
    from celery.bin.celery import celery

    from worker.app import app  # reads FORKVM_DOMAIN

    arguments = ["worker", "-Q", settings.queue, "--loglevel", loglevel]
    if concurrency is not None:
        arguments += ["--concurrency", str(concurrency)]
    # As Celery.worker_main, which drops the exit code.
    celery.params[0].default = app
    sys.exit(celery.main(args=arguments, standalone_mode=False) or DONE)


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
