"""The command line: `forkvm`. Exit codes: 0 done, 1 the fork failed, 2 a bad call, 3 no broker, 130 Ctrl-C."""

from __future__ import annotations

import logging
import os
import sys
import uuid
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Never, cast

import click

from tasks import contract
from tasks.copier.compare import compare
from tasks.copier.errors import Code, ForkError, describe
from tasks.copier.gc import collect
from tasks.copier.kernel.roots import normal_path
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
    as_json,
    connect,
    ended_by_signals,
    fork_options,
    local_processes,
    request_of,
    watching,
    with_domain,
)
from worker.campaigns import campaign, forks
from worker.doctor import doctor
from worker.settings import NO_ROOTS, BadSettings, NoBroker, Settings, read_settings, roots_of
from worker.show import (
    answer,
    answer_json,
    any_result_lines,
    comparison_lines,
    comparison_record,
    file_line,
    progress_bar,
    progress_line,
    result_lines,
    say,
)

if TYPE_CHECKING:
    from worker.client import Client, Status

#: How long `cancel` waits to see the end, in seconds.
_CANCEL_SECONDS = 10.0


def main() -> Never:
    """The entry point; turns what is known to go wrong into one line and an exit code."""
    # Names that are not UTF-8 go out as they came in, and nothing that is printed can raise.
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    sys.stderr.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    logging.getLogger("tasks").addHandler(logging.NullHandler())  # a worker's log has what goes unsaid here
    try:
        # Without its standalone mode, click returns the code of an Exit instead of ending the process.
        sys.exit(cli(standalone_mode=False) or DONE)
    except click.ClickException as error:
        error.show()
        sys.exit(BAD_CALL)
    except click.Abort:  # Ctrl-C where nothing else is said of it
        sys.exit(INTERRUPTED)
    except BadSettings as error:
        say(str(error))
        sys.exit(BAD_CALL)
    except NoBroker as error:
        say(str(error))
        sys.exit(NO_BROKER)
    except ForkError as error:
        say(describe(error.record()))
        sys.exit(BAD_CALL if error.code is Code.INVALID_REQUEST else FAILED)


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
    request = request_of({"source": source, "destination": destination}, fields)
    with progress_bar() as show, ended_by_signals(show) as beat:
        result = _fork_here(settings, request, beat)
    _answer_result(result, as_json)


@cli.command()
@click.argument("source")
@click.argument("destination")
@click.option("--id", "fork_id", help="The fork's id, and its idempotency key; made up by default.")
@click.option("--domain", help="The domain that is to make it.")
@click.option("--wait", is_flag=True, help="Wait for the result, and answer with it.")
@fork_options
@as_json
def submit(
    source: str, destination: str, fork_id: str | None, domain: str | None, wait: bool, as_json: bool, **fields: Any
) -> None:
    """Enqueue a fork for a worker."""
    request = request_of({"source": source, "destination": destination}, fields)
    contract.parse(request)  # what is wrong with it, the caller learns here
    client = connect(with_domain(read_settings(), domain))
    fork_id = fork_id or uuid.uuid4().hex
    client.submit(request, fork_id)
    if not wait:
        answer_json({"id": fork_id}) if as_json else answer(fork_id)
        return
    with watching(fork_id) as show:
        result = client.wait_for_result(fork_id, show)
    _answer_result(cast(ForkResult, result), as_json)


@cli.command()
@click.argument("fork_id", metavar="ID")
@click.option("--watch", is_flag=True, help="Show the progress until the fork has ended.")
@as_json
def status(fork_id: str, watch: bool, as_json: bool) -> None:
    """The result of a fork or campaign, or its progress."""
    client = connect(read_settings())
    if watch:
        with watching(fork_id) as show:
            found = client.wait(fork_id, show)
    else:
        found = client.status(fork_id)
    if as_json:
        answer_json({"id": fork_id, "state": found.state, "progress": found.progress, "result": found.result})
    else:
        _answer_status(fork_id, found)
    if found.result is not None and found.result["status"] != "succeeded":
        raise click.exceptions.Exit(FAILED)


@cli.command()
@click.argument("fork_id", metavar="ID")
@click.option("--failed", is_flag=True, help="Only the entries that failed.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document a line.")
def files(fork_id: str, failed: bool, as_json: bool) -> None:
    """The results of a fork's entries, as many as there are by now."""
    for result in connect(read_settings()).results.files(fork_id):
        if failed and result["error"] is None:
            continue
        answer_json(result) if as_json else answer(file_line(result))


@cli.command()
@click.argument("fork_id", metavar="ID")
@as_json
def cancel(fork_id: str, as_json: bool) -> None:
    """End a fork or campaign, and leave nothing that is not published."""
    client = connect(read_settings())
    found = client.status(fork_id)
    if found.result is None:
        client.cancel(fork_id)
        found = client.wait(fork_id, lambda progress: None, _CANCEL_SECONDS)
    if as_json:
        answer_json({"id": fork_id, "state": found.state, "result": found.result})
    elif found.result is None:
        answer(f"{fork_id}: asked for; it ends when a worker comes to it")
    else:
        _answer_status(fork_id, found)
    if found.result is not None and found.result["status"] != "cancelled":
        raise click.exceptions.Exit(FAILED)


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
@click.argument("directories", nargs=-1)
@as_json
def gc(directories: tuple[str, ...], as_json: bool) -> None:
    """Remove the staging that a dead machine left below DIRECTORIES (default: the roots), never a live fork's."""
    settings = read_settings()
    searched = [normal_path(directory, "directory") for directory in directories] or list(settings.roots)
    if not searched:
        raise click.UsageError("nothing to search: name directories, or set FORKVM_ROOTS")
    client: list[Client | None] = []

    def is_live(fork_id: str) -> bool | None:
        if not client:  # asked only when there is something to ask about
            try:
                client.append(connect(settings))
            except NoBroker as error:
                say(str(error))
                client.append(None)
        return None if client[0] is None else client[0].results.is_open(fork_id)

    findings = [finding for directory in searched for finding in collect(directory, is_live)]
    if as_json:
        answer_json([vars(finding) for finding in findings])
        return
    for finding in findings:
        fork = f" (fork {finding.fork_id})" if finding.fork_id else ""
        answer(f"{finding.verdict} {finding.path}{fork}: {finding.reason}")
    removed = sum(finding.verdict == "removed" for finding in findings)
    answer(f"{removed} removed, {len(findings) - removed} kept")


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
    from worker.app import app  # the settings above are its own

    arguments = ["worker", "-Q", settings.queue, "--loglevel", loglevel]
    if concurrency is not None:
        arguments += ["--concurrency", str(concurrency)]
    app.worker_main(arguments)


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


def _answer_result(result: ForkResult, as_json: bool) -> None:
    error = result["error"]
    if as_json:
        answer_json(result)
    elif error is None:
        for line in result_lines(result):
            answer(line)
    if error is not None:
        say(describe(error))
        raise click.exceptions.Exit(BAD_CALL if error["code"] == Code.INVALID_REQUEST else FAILED)


def _answer_status(job_id: str, found: Status) -> None:
    if found.result is not None:
        for line in any_result_lines(found.result):
            answer(line)
    elif found.progress is not None:
        answer(progress_line(job_id, found.progress))
    else:
        answer(f"{job_id}: {found.state} (waiting in the queue, or never sent)")


cli.add_command(campaign)
cli.add_command(forks)
cli.add_command(doctor)

if __name__ == "__main__":
    main()
