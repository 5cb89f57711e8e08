"""The commands for queued jobs: `forkvm submit`, `status`, `files` and `cancel`."""

from __future__ import annotations

import shlex
import uuid
from itertools import chain
from typing import TYPE_CHECKING, Any, cast

import click

from worker.commands.help import command
from worker.commands.options import (
    ID,
    PATH,
    absolute,
    as_json,
    connect,
    domain_option,
    fork_options,
    print_result,
    request_of,
    with_domain,
)
from worker.commands.output import any_result_lines, file_line, progress_line
from worker.commands.waiting import is_over, refuse_unknown, wait_for_result, wait_options, watching
from worker.exit_codes import FAILED, NO_BROKER, TIMED_OUT
from worker.settings import read_settings
from worker.terminal.printing import print_json, print_line, print_message
from worker.terminal.streams import stdout_failed

if TYPE_CHECKING:
    from tasks.copier.fork_spec import ForkResult
    from worker.client import Client, Status

#: How long `cancel` waits for the job to end, in seconds.
_CANCEL_SECONDS = 10.0


@command(
    example="forkvm submit /guests/vm-1 /guests/vm-2 --id vm-2 --wait",
    done="The fork is queued or, with --wait, has succeeded.",
    failed="With --wait: the fork failed or was cancelled.",
    codes=(NO_BROKER, TIMED_OUT),
)
@click.argument("source", type=PATH)
@click.argument("destination", type=PATH)
@click.option("--id", "fork_id", type=ID, metavar="ID", help="Id of the fork; an id is run only once. Default: random.")
@domain_option
@wait_options
@fork_options
@as_json
def submit(
    source: str,
    destination: str,
    fork_id: str | None,
    domain: str | None,
    wait: bool,
    timeout: float | None,
    as_json: bool,
    **fields: Any,
) -> None:
    """Queue a fork for a worker, and print its id.

    SOURCE and DESTINATION are made absolute first, if they are relative. The worker must see them under the same
    absolute paths.
    """
    from tasks.contract import fork_request

    request = request_of({"source": absolute(source), "destination": absolute(destination)}, fields)
    fork_id = fork_id or uuid.uuid4().hex
    fork_request.spec_of(request, fork_id, owner="queue")  # refuses a wrong request at once
    client = connect(with_domain(read_settings(), domain))
    client.submit(request, fork_id)
    if not wait:
        print_json({"id": fork_id}) if as_json else print_line(fork_id)
        return
    print_result(cast("ForkResult", wait_for_result(client, fork_id, timeout)), as_json)


@command(
    example="forkvm status vm-2 --watch",
    done="The job has succeeded or has not ended.",
    failed="The job failed or was cancelled.",
    codes=(NO_BROKER,),
    of_job=True,
)
@click.argument("fork_id", type=ID, metavar="ID")
@click.option("--watch", is_flag=True, help="Show the progress until the job has ended.")
@as_json
def status(fork_id: str, watch: bool, as_json: bool) -> None:
    """Show a fork's or campaign's progress or result."""
    client = connect(read_settings())
    found = client.status(fork_id)
    known = client.is_known(fork_id, found)
    if watch and known:
        with watching(fork_id, client.queue) as show:
            found = client.wait(fork_id, show)
    if as_json:
        print_json({"id": fork_id, "state": found.state, "progress": found.progress, "result": found.result})
    elif known:
        _print_status(fork_id, found)
    if not known:
        refuse_unknown(fork_id)
    if found.result is not None and found.result["status"] != "succeeded":
        raise click.exceptions.Exit(FAILED)


@command(example="forkvm files vm-2 --failed", done="The list was printed.", codes=(NO_BROKER,), of_job=True)
@click.argument("fork_id", type=ID, metavar="ID")
@click.option("--failed", is_flag=True, help="List only the files that failed.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document a line.")
def files(fork_id: str, failed: bool, as_json: bool) -> None:
    """List what was done with each file of a fork.

    While the fork runs, the list has the files that are done so far.
    """
    client = connect(read_settings())
    results = client.results.pages.files(fork_id)
    first = next(results, None)
    if first is None and not client.is_known(fork_id, client.status(fork_id)):
        refuse_unknown(fork_id)
    for result in chain([] if first is None else [first], results):
        if stdout_failed():
            return
        if not failed or result["error"] is not None:
            print_json(result) if as_json else print_line(file_line(result))


@command(
    example="forkvm cancel vm-2",
    done="The job was cancelled, or a worker will cancel it.",
    failed="The job has ended already, or the fork belongs to a campaign.",
    codes=(NO_BROKER,),
    of_job=True,
)
@click.argument("fork_id", type=ID, metavar="ID")
@as_json
def cancel(fork_id: str, as_json: bool) -> None:
    """Cancel a fork or campaign.

    Its unpublished files are removed. The forks that a campaign has published already are kept. Waits up to 10 seconds
    for the job to end.
    """
    client = connect(read_settings())
    found = client.status(fork_id)
    _refuse_fork_of_campaign(client, fork_id, found)
    if not client.is_known(fork_id, found):
        refuse_unknown(fork_id)
    if is_over(found):
        print_message(f"{fork_id}: not cancelled: it has ended already ({found.state})")
    else:
        client.cancel(fork_id)
        found = client.wait(fork_id, lambda progress: None, _CANCEL_SECONDS)
    if as_json:
        print_json({"id": fork_id, "state": found.state, "result": found.result})
    elif is_over(found):
        _print_status(fork_id, found)
    else:
        print_line(f"{fork_id}: cancellation requested; waiting for a worker")
    if found.result is not None and found.result["status"] != "cancelled":
        raise click.exceptions.Exit(FAILED)


def _refuse_fork_of_campaign(client: Client, fork_id: str, found: Status) -> None:
    """End the command if the fork belongs to a campaign: only the whole campaign can be cancelled."""
    campaign_id = None if is_over(found) else client.campaign_of_fork(fork_id)
    if campaign_id is not None:
        whole = f"cancel the campaign: forkvm cancel {shlex.quote(campaign_id)}"
        print_message(f"{fork_id}: not cancelled: it is a fork of the campaign {campaign_id}; {whole}")
        raise click.exceptions.Exit(FAILED)


def _print_status(job_id: str, found: Status) -> None:
    if found.result is not None:
        for line in any_result_lines(found.result):
            print_line(line)
    elif found.progress is not None:
        print_line(progress_line(job_id, found.progress))
    elif is_over(found):
        print_line(f"{job_id}: {found.state} without a result; see the worker's log")
    else:
        print_line(f"{job_id}: {found.state}{'; waiting in the queue' if found.state == 'PENDING' else ''}")
