"""The commands that start a worker: `forkvm worker` and `forkvm demo`."""

from __future__ import annotations

import os
import sys

import click

from worker.commands.options import DONE, with_domain
from worker.settings import NO_ROOTS, read_settings


@click.command()
@click.option("--domain", help="The domain to serve; FORKVM_DOMAIN by default.")
@click.option(
    "--concurrency",
    type=click.IntRange(1),
    help="Pool processes; FORKVM_CONCURRENCY, or as many as the worker may use CPUs, by default.",
)
@click.option("--loglevel", default="INFO", show_default=True)
def worker(domain: str | None, concurrency: int | None, loglevel: str) -> None:
    """Serve a domain's queue until TERM, which lets running work end first."""
    settings = with_domain(read_settings(), domain)
    if not settings.roots:
        raise click.UsageError(NO_ROOTS)
    if domain is not None:
        os.environ["FORKVM_DOMAIN"] = domain
    from celery.bin.celery import celery

    from worker.app import app  # the settings above are its own

    arguments = ["worker", "-Q", settings.queue, "--loglevel", loglevel]
    if concurrency is not None:
        arguments += ["--concurrency", str(concurrency)]
    # What Celery.worker_main does, but for the exit code, which that drops.
    celery.params[0].default = app
    sys.exit(celery.main(args=arguments, standalone_mode=False) or DONE)


@click.command()
@click.option("--dir", "directory", help="Where to make the guest directory; by default an XFS of its own, or /tmp.")
def demo(directory: str | None) -> None:
    """The whole system at once on this machine: Redis, a worker, a guest directory, a fork, its results, the proof."""
    from worker.commands.demo import run_demo

    run_demo(directory)
