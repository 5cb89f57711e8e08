"""Waiting for a job of the queue, and what is said of one."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from tasks.copier.errors import Code, ForkError
from worker.commands.options import INTERRUPTED, TIMED_OUT
from worker.commands.output import progress_bar
from worker.terminal import ShowProgress, say

if TYPE_CHECKING:
    from tasks.copier.campaign.spec import CampaignResult
    from tasks.copier.fork_spec import ForkResult
    from worker.client import Client, Status


def wait_options(command: Callable[..., None]) -> Callable[..., None]:
    """Whether, and for how long, a command that enqueues a job waits for its result."""
    for option in (
        click.option(
            "--timeout",
            type=click.FloatRange(0, min_open=True),
            metavar="SECONDS",
            help="With --wait: give up waiting after so long; exit code 124, and the job continues.",
        ),
        click.option("--wait", is_flag=True, help="Wait for the result, and answer with it."),
    ):
        command = option(command)
    return command


def wait_for_result(
    client: Client, job_id: str, timeout: float | None, queue: str | None = None
) -> ForkResult | CampaignResult:
    """Wait for the result of a job that was sent to `queue` (default: that of the settings).

    Ends the command with exit code 124 after `timeout` seconds. Raises ForkError where the job ends without a result.
    """
    say(f"waiting for {job_id}")
    with watching(job_id) as show:
        found = client.wait(job_id, show, timeout, queue)
    if found.result is not None:
        return found.result
    if is_over(found):
        raise ForkError(Code.IO_ERROR, f"it ended as {found.state} without a result; see the worker's log", job_id)
    say(f"{job_id} has not ended within {timeout:g} s; it continues: forkvm status {shlex.quote(job_id)}")
    raise click.exceptions.Exit(TIMED_OUT)


def is_over(status: Status) -> bool:
    """Whether a job has ended, in whatever way."""
    return status.result is not None or status.state in ("SUCCESS", "FAILURE", "REVOKED")


def unknown(job_id: str) -> str:
    """What is said of an id that nothing is known of."""
    return (
        f"{job_id}: unknown id: no worker has begun it, and it does not wait in this domain's queue; "
        "check the id and FORKVM_DOMAIN (results expire after FORKVM_RESULT_EXPIRES seconds)"
    )


@contextmanager
def watching(job_id: str) -> Iterator[ShowProgress]:
    """Show the progress of a job of the queue. Ctrl-C ends the waiting, not the job."""
    try:
        with progress_bar() as show:
            yield show
    except KeyboardInterrupt:
        say(f"{job_id} continues without this command; to see it: forkvm status {shlex.quote(job_id)}")
        raise click.exceptions.Exit(INTERRUPTED) from None
