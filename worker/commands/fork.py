"""The local commands: `forkvm fork` and `forkvm verify`."""

from __future__ import annotations

import os
import uuid
from contextlib import ExitStack
from typing import Any

import click

from tasks.contract import fork_request
from tasks.copier.errors import ForkError
from tasks.copier.fork.local import fork_here
from tasks.copier.fork_spec import ForkResult
from tasks.copier.options import DEFAULT_EXCLUDE
from tasks.copier.progress import Beat
from tasks.copier.source.selection import Selection
from worker.commands.options import FAILED, absolute, answer_result, as_json, fork_options, local_processes, request_of
from worker.commands.output import comparison_lines, comparison_record, progress_bar
from worker.commands.signals import ended_by_signals
from worker.settings import Settings, read_settings, roots_of
from worker.terminal import answer, answer_json


@click.command()
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


@click.command()
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
    from tasks.copier.clone.compare import compare  # a fork does without it

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


def _fork_here(settings: Settings, request: dict[str, Any], beat: Beat) -> ForkResult:
    fork_id = f"local-{uuid.uuid4().hex}"
    try:
        spec = fork_request.spec_of(request, fork_id, owner="local")
    except ForkError as error:
        return fork_request.refused(request, fork_id, error)
    return fork_here(spec, roots_of(settings), settings.limits, local_processes(), beat)
