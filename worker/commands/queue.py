"""The commands of jobs in the queue: `forkvm submit`, `status`, `files` and `cancel`."""

from __future__ import annotations

import shlex
import uuid
from itertools import chain
from typing import TYPE_CHECKING, Any, cast

import click

from tasks.contract import fork_request
from tasks.copier.fork_spec import ForkResult
from worker.commands.options import (
    FAILED,
    absolute,
    answer_result,
    as_json,
    connect,
    fork_options,
    request_of,
    with_domain,
)
from worker.commands.output import any_result_lines, file_line, progress_line
from worker.commands.streams import reader_is_gone
from worker.commands.waiting import is_over, unknown, wait_for_result, wait_options, watching
from worker.settings import read_settings
from worker.terminal import answer, answer_json, say

if TYPE_CHECKING:
    from worker.client import Client, Status

#: How long `cancel` waits to see the end, in seconds.
_CANCEL_SECONDS = 10.0


@click.command()
@click.argument("source")
@click.argument("destination")
@click.option("--id", "fork_id", help="The fork's id, and its idempotency key; made up by default.")
@click.option("--domain", help="The domain that is to make it.")
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
    """Enqueue a fork for a worker. Relative paths are resolved here, so the worker must see the same directories."""
    request = request_of({"source": absolute(source), "destination": absolute(destination)}, fields)
    fork_request.parse(request)  # the caller learns here what is wrong with it
    client = connect(with_domain(read_settings(), domain))
    fork_id = fork_id or uuid.uuid4().hex
    client.submit(request, fork_id)
    if not wait:
        answer_json({"id": fork_id}) if as_json else answer(fork_id)
        return
    answer_result(cast(ForkResult, wait_for_result(client, fork_id, timeout)), as_json)


@click.command()
@click.argument("fork_id", metavar="ID")
@click.option("--watch", is_flag=True, help="Show the progress until the fork has ended.")
@as_json
def status(fork_id: str, watch: bool, as_json: bool) -> None:
    """The result of a fork or campaign, or its progress."""
    client = connect(read_settings())
    found = client.status(fork_id)
    known = client.is_known(fork_id, found)
    if watch and known:
        with watching(fork_id) as show:
            found = client.wait(fork_id, show)
    if as_json:
        answer_json({"id": fork_id, "state": found.state, "progress": found.progress, "result": found.result})
    elif known:
        _answer_status(fork_id, found)
    if not known:
        say(unknown(fork_id))
    if not known or (found.result is not None and found.result["status"] != "succeeded"):
        raise click.exceptions.Exit(FAILED)


@click.command()
@click.argument("fork_id", metavar="ID")
@click.option("--failed", is_flag=True, help="Only the entries that failed.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document a line.")
def files(fork_id: str, failed: bool, as_json: bool) -> None:
    """The results of a fork's entries, as many as there are by now."""
    client = connect(read_settings())
    results = client.results.pages.files(fork_id)
    first = next(results, None)
    if first is None and not client.is_known(fork_id, client.status(fork_id)):
        say(unknown(fork_id))
        raise click.exceptions.Exit(FAILED)
    for result in chain([] if first is None else [first], results):
        if reader_is_gone():
            return
        if not failed or result["error"] is not None:
            answer_json(result) if as_json else answer(file_line(result))


@click.command()
@click.argument("fork_id", metavar="ID")
@as_json
def cancel(fork_id: str, as_json: bool) -> None:
    """End a fork or campaign, and leave nothing that is not published."""
    client = connect(read_settings())
    found = client.status(fork_id)
    _refuse_fork_of_campaign(client, fork_id, found)
    if not client.is_known(fork_id, found):
        say(unknown(fork_id))
        raise click.exceptions.Exit(FAILED)
    if is_over(found):
        say(f"{fork_id}: nothing was cancelled: it has ended already ({found.state})")
    else:
        client.cancel(fork_id)
        found = client.wait(fork_id, lambda progress: None, _CANCEL_SECONDS)
    if as_json:
        answer_json({"id": fork_id, "state": found.state, "result": found.result})
    elif is_over(found):
        _answer_status(fork_id, found)
    else:
        answer(f"{fork_id}: cancellation requested; waiting for a worker")
    if found.result is not None and found.result["status"] != "cancelled":
        raise click.exceptions.Exit(FAILED)


def _refuse_fork_of_campaign(client: Client, fork_id: str, found: Status) -> None:
    """A campaign's forks are made together, in batches; only the campaign can be cancelled."""
    campaign_id = None if is_over(found) else client.campaign_of_fork(fork_id)
    if campaign_id is not None:
        whole = f"cancel the campaign: forkvm cancel {shlex.quote(campaign_id)}"
        say(f"{fork_id}: nothing was cancelled: it is a fork of the campaign {campaign_id}; {whole}")
        raise click.exceptions.Exit(FAILED)


def _answer_status(job_id: str, found: Status) -> None:
    if found.result is not None:
        for line in any_result_lines(found.result):
            answer(line)
    elif found.progress is not None:
        answer(progress_line(job_id, found.progress))
    elif is_over(found):
        answer(f"{job_id}: {found.state}, without a result; the worker's log has the reason")
    else:
        answer(f"{job_id}: {found.state}{'; it waits in the queue' if found.state == 'PENDING' else ''}")
