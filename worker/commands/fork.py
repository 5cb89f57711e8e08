"""The local commands: `forkvm fork`, `forkvm estimate` and `forkvm verify`."""

from __future__ import annotations

import os
import uuid
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import click

from tasks.copier.errors import Code, ForkError, describe
from tasks.copier.options import DEFAULT_EXCLUDE
from worker.commands.help import command
from worker.commands.options import (
    PATH,
    absolute,
    as_json,
    fork_options,
    local_processes,
    prepare_io,
    print_result,
    request_of,
)
from worker.commands.output import comparison_lines, comparison_record, estimate_lines, progress_bar
from worker.exit_codes import BAD_CALL, FAILED
from worker.settings import Settings, read_settings
from worker.terminal.printing import print_json, print_line, print_message
from worker.terminal.signals import cancelled_by_signals

if TYPE_CHECKING:
    from tasks.copier.fork_spec import ForkResult
    from tasks.copier.progress import Poll


@command(
    example="forkvm fork /guests/vm-1 /guests/vm-2",
    failed="The fork failed, or a signal cancelled it. DESTINATION is not created.",
)
@click.argument("source", type=PATH)
@click.argument("destination", type=PATH)
@fork_options
@as_json
def fork(source: str, destination: str, as_json: bool, **fields: Any) -> None:
    """Clone a directory in this process.

    SOURCE is cloned to DESTINATION, which must not exist. No broker and no worker are needed. The fork appears at
    DESTINATION when it is complete.
    """
    settings = read_settings()
    request = request_of({"source": absolute(source), "destination": absolute(destination)}, fields)
    with progress_bar() as show, cancelled_by_signals(show) as poll:
        result = _fork_here(settings, request, poll)
    print_result(result, as_json)


@command(
    example="forkvm estimate /guests/vm-1 /guests/vm-2",
    done="The estimate was printed, also if the fork would not fit.",
    failed="The fork would fail, or a signal cancelled the estimate.",
)
@click.argument("source", type=PATH)
@click.argument("destination", type=PATH)
@fork_options
@as_json
def estimate(source: str, destination: str, as_json: bool, **fields: Any) -> None:
    """Report what a fork would do and cost.

    Walks SOURCE and tries one reflink to DESTINATION's directory, as the fork would. Prints the method, the bytes to
    copy, the time, and warnings. Leaves nothing behind.
    """
    from tasks.contract import fork_request
    from tasks.copier.estimate.estimate import estimate
    from tasks.copier.roots import Roots

    settings = read_settings()
    request = request_of({"source": absolute(source), "destination": absolute(destination)}, fields)
    try:
        spec = fork_request.spec_of(request, f"estimate-{uuid.uuid4().hex}", owner="local")
        with progress_bar() as show, cancelled_by_signals(show) as poll:
            found = estimate(spec, Roots(settings.roots), settings.limits, poll)
    except ForkError as error:
        print_message(describe(error.record()))
        raise click.exceptions.Exit(BAD_CALL if error.code is Code.INVALID_REQUEST else FAILED) from None
    if as_json:
        print_json(found)
        return
    for line in estimate_lines(found):
        print_line(line)


@command(
    example="forkvm verify /guests/vm-1 /guests/vm-2",
    done="The directories are the same.",
    failed="The directories differ, or something could not be read.",
)
@click.argument("source", type=PATH)
@click.argument("clone", type=PATH)
@click.option("--skip", multiple=True, metavar="PATH", help="The fork's --skip. Repeatable.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="The fork's --exclude. Repeatable.")
@click.option("--no-exclude", is_flag=True, help="The fork was made with --no-exclude.")
@as_json
def verify(
    source: str, clone: str, skip: tuple[str, ...], exclude: tuple[str, ...], no_exclude: bool, as_json: bool
) -> None:
    """Compare a directory with its clone.

    Also prints how many bytes the two share on disk.
    """
    from tasks.copier.clone.compare import compare
    from tasks.copier.roots import Roots
    from tasks.copier.source.selection import Selection

    roots = Roots(read_settings().roots)
    source, clone = absolute(source), absolute(clone)
    patterns = exclude or (() if no_exclude else DEFAULT_EXCLUDE)
    with ExitStack() as opened:
        source_fd = roots.open_source(source)
        opened.callback(os.close, source_fd)
        clone_fd = roots.open_source(clone, "clone")
        opened.callback(os.close, clone_fd)
        found = compare(source_fd, clone_fd, Selection(skip, patterns))
    if as_json:
        print_json(comparison_record(source, clone, found))
    else:
        for line in comparison_lines(source, clone, found):
            print_line(line)
    if not found.same:
        raise click.exceptions.Exit(FAILED)


def _fork_here(settings: Settings, request: dict[str, Any], poll: Poll) -> ForkResult:
    from tasks.contract import fork_request
    from tasks.copier.fork.local import fork_here
    from tasks.copier.roots import Roots

    fork_id = f"local-{uuid.uuid4().hex}"
    try:
        spec = fork_request.spec_of(request, fork_id, owner="local")
    except ForkError as error:
        return fork_request.refused(request, fork_id, error)
    prepare_io(settings)
    return fork_here(spec, Roots(settings.roots), settings.limits, local_processes(), poll, settings.copy_pace)
