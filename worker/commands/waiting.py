"""Waiting for the result of a queued job, and the messages about it."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

import click

from tasks.copier.errors import Code, ForkError
from worker.commands.options import Seconds
from worker.commands.output import progress_bar
from worker.exit_codes import BAD_CALL, INTERRUPTED, TIMED_OUT
from worker.settings import read_settings
from worker.terminal.printing import ShowProgress, print_message

if TYPE_CHECKING:
    from tasks.copier.campaign.spec import CampaignResult
    from tasks.copier.fork_spec import ForkResult
    from worker.client import Client, Status


def wait_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options --wait and --timeout of a command that queues a job."""
    for option in (
        click.option(
            "--timeout",
            type=Seconds(0, min_open=True),
            metavar="SECONDS",
            help="With --wait: stop waiting after this time, with exit code 124. The job continues.",
        ),
        click.option("--wait", is_flag=True, help="Wait for the job to end, and print its result."),
    ):
        command = option(command)
    return command


def wait_for_result(
    client: Client, job_id: str, timeout: float | None, queue: str | None = None
) -> ForkResult | CampaignResult:
    """Wait for the result of a job that was sent to `queue` (default: the queue of the settings).

    Ends the command with exit code 124 after `timeout` seconds. Raises ForkError if the job ends without a result.
    """
    queue = queue or client.queue
    print_message(f"waiting for {job_id}")
    with watching(job_id, queue) as show:
        found = client.wait(job_id, show, timeout, queue)
    if found.result is not None:
        return found.result
    if is_over(found):
        raise ForkError(Code.IO_ERROR, f"the job ended as {found.state} without a result; see the worker's log", job_id)
    print_message(f"{job_id} did not end within {timeout:g} s and continues; {_how_to_see(job_id, queue)}")
    raise click.exceptions.Exit(TIMED_OUT)


def is_over(status: Status) -> bool:
    """Whether a job has ended, with a result or without."""
    return status.result is not None or status.state in ("SUCCESS", "FAILURE", "REVOKED")


def refuse_unknown(job_id: str) -> NoReturn:
    """End the command because the id is unknown: a bad call, since no fork failed."""
    print_message(
        f"{job_id}: unknown id: no worker has started it, and it is not in this domain's queue; "
        "check the id and FORKVM_DOMAIN (results expire after FORKVM_RESULT_EXPIRES seconds)"
    )
    raise click.exceptions.Exit(BAD_CALL)


@contextmanager
def watching(job_id: str, queue: str) -> Iterator[ShowProgress]:
    """Show the progress of a job that was sent to `queue`. Ctrl-C ends the command but not the job."""
    try:
        with progress_bar() as show:
            yield show
    except KeyboardInterrupt:
        print_message(f"{job_id} continues; {_how_to_see(job_id, queue)}")
        raise click.exceptions.Exit(INTERRUPTED) from None


def _how_to_see(job_id: str, queue: str) -> str:
    """The command that shows the job. While no worker has begun with it, only its domain's queue has it."""
    domain = "" if queue == read_settings().queue else f"FORKVM_DOMAIN={queue.partition('.')[2]} "
    return f"to see it: {domain}forkvm status {shlex.quote(job_id)}"
