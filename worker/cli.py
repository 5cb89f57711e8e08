"""The command line: `forkvm`. Exit codes: 0 done, 1 the fork failed, 2 a bad call, 3 no broker, 130 Ctrl-C."""

from __future__ import annotations

import logging
import os
import sys
import uuid
from contextlib import ExitStack
from typing import Any, Never

import click

from tasks import contract
from tasks.copier.compare import compare
from tasks.copier.errors import Code, ForkError, describe
from tasks.copier.local import fork_here
from tasks.copier.options import DEFAULT_EXCLUDE
from tasks.copier.progress import Beat
from tasks.copier.selection import Selection
from tasks.copier.spec import ForkResult
from worker.arguments import (
    BAD_CALL,
    DONE,
    FAILED,
    INTERRUPTED,
    NO_BROKER,
    absolute,
    answer_result,
    as_json,
    fork_options,
    local_processes,
    request_of,
    with_domain,
)
from worker.campaigns import campaign, forks
from worker.doctor import doctor
from worker.environment import remove_celery_variables
from worker.faults import exit_code, unexpected
from worker.garbage import gc
from worker.jobs import cancel, files, status, submit
from worker.settings import NO_ROOTS, BadSettings, NoBroker, Settings, read_settings, roots_of
from worker.show import (
    answer,
    answer_json,
    comparison_lines,
    comparison_record,
    progress_bar,
    say,
    say_usage,
)
from worker.signals import end_on_signals, ended_by_signals
from worker.streams import close_streams, open_streams, use_utf8


def main() -> Never:
    """The entry point; turns what is known to go wrong into one line and an exit code."""
    use_utf8()
    open_streams()
    end_on_signals()
    remove_celery_variables()
    logging.getLogger("tasks").addHandler(logging.NullHandler())  # only a worker logs what it does
    try:
        code = _run()
    finally:
        close_streams()
    sys.exit(code)


def _run() -> int:
    """Run the command; its exit code."""
    try:
        # Without its standalone mode, click returns the code of an Exit instead of ending the process.
        return cli(standalone_mode=False) or DONE
    except click.ClickException as error:
        say_usage(error)
        return BAD_CALL
    except click.Abort:  # Ctrl-C
        return INTERRUPTED
    except BadSettings as error:
        say(str(error))
        return BAD_CALL
    except NoBroker as error:
        say(str(error))
        return NO_BROKER
    except ForkError as error:
        say(describe(error.record()))
        return BAD_CALL if error.code is Code.INVALID_REQUEST else FAILED
    except Exception as error:
        say(unexpected(error))
        return exit_code(error)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="forkvm")
def cli() -> None:
    """Clone the directories of virtual machines: by reflink where the filesystem can, sparsely where it cannot."""


@cli.command()
@click.argument("source")
@click.argument("destination")
@fork_options
@as_json
def fork(source: str, destination: str, as_json: bool, **fields: Any) -> None:
    """Make one fork here and now, without a broker."""
    settings = read_settings()
    request = request_of({"source": absolute(source), "destination": absolute(destination)}, fields)
    with progress_bar() as show, ended_by_signals(show) as beat:
        result = _fork_here(settings, request, beat)
    answer_result(result, as_json)


@cli.command()
@click.argument("source")
@click.argument("clone")
@click.option("--skip", multiple=True, metavar="PATH", help="What the clone was made without; as for fork.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="As for fork.")
@click.option("--no-exclude", is_flag=True, help="The clone was made without leaving anything out by pattern.")
@as_json
def verify(
    source: str, clone: str, skip: tuple[str, ...], exclude: tuple[str, ...], no_exclude: bool, as_json: bool
) -> None:
    """Compare a directory with its clone, and print how many bytes they share on disk.

    Exit code 1: they differ, or something could not be compared.
    """
    roots = roots_of(read_settings())
    source, clone = absolute(source), absolute(clone)
    patterns = exclude or (() if no_exclude else DEFAULT_EXCLUDE)
    with ExitStack() as opened:
        source_fd = roots.open_source(source)
        opened.callback(os.close, source_fd)
        clone_fd = roots.open_source(clone, "clone")
        opened.callback(os.close, clone_fd)
        found = compare(source_fd, clone_fd, Selection(skip, patterns))
    if as_json:
        answer_json(comparison_record(source, clone, found))
    else:
        for line in comparison_lines(source, clone, found):
            answer(line)
    if not found.same:
        raise click.exceptions.Exit(FAILED)


@cli.command()
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


@cli.command()
@click.option("--dir", "directory", help="Where to make the guest directory; by default an XFS of its own, or /tmp.")
def demo(directory: str | None) -> None:
    """The whole system at once on this machine: Redis, a worker, a guest directory, a fork, its results, the proof."""
    from worker.demo import run_demo

    run_demo(directory)


def _fork_here(settings: Settings, request: dict[str, Any], beat: Beat) -> ForkResult:
    fork_id = f"local-{uuid.uuid4().hex}"
    try:
        spec = contract.spec_of(request, fork_id, owner="local")
    except ForkError as error:
        return contract.refused(request, fork_id, error)
    return fork_here(spec, roots_of(settings), settings.limits, local_processes(), beat)


for _command in (submit, status, files, cancel, campaign, forks, doctor, gc):
    cli.add_command(_command)

if __name__ == "__main__":
    main()
