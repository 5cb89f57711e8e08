"""The commands of campaigns: `forkvm campaign` and `forkvm forks`."""

from __future__ import annotations

import sys
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

import click
from click.core import ParameterSource

from tasks.copier.errors import Code, ForkError, describe
from tasks.copier.options import OnError
from worker.commands.help import command
from worker.commands.options import (
    ID,
    PATH,
    absolute,
    as_json,
    connect,
    domain_option,
    fork_options,
    local_processes,
    prepare_io,
    request_of,
    with_domain,
)
from worker.commands.output import campaign_lines, fork_line, progress_bar
from worker.commands.waiting import refuse_unknown, wait_for_result, wait_options
from worker.exit_codes import BAD_CALL, FAILED, NO_BROKER, TIMED_OUT
from worker.settings import read_settings
from worker.terminal.printing import print_json, print_line, print_message
from worker.terminal.signals import cancelled_by_signals
from worker.terminal.streams import stdout_failed

if TYPE_CHECKING:
    from tasks.contract.campaign_request import Summary
    from tasks.copier.campaign.spec import CampaignResult
    from tasks.store.claims import Claim
    from worker.client import Client

#: The parameters that may be combined with --retry. The others come from the earlier campaign.
_WITH_RETRY = frozenset({"earlier", "campaign_id", "domain", "local", "wait", "timeout", "as_json"})


@command(
    example="forkvm campaign /guests/vm-1 --to '/guests/fork-{n:04}' --count 100",
    done="The campaign is queued or, with --wait or --local, has succeeded.",
    failed="With --wait or --local: a fork failed, or the campaign was cancelled.",
    codes=(NO_BROKER, TIMED_OUT),
)
@click.argument("source", required=False, type=PATH)
@click.option(
    "--to", "template", type=PATH, metavar="TEMPLATE", help="Path of each destination, with its number as {n}."
)
@click.option("--count", type=int, metavar="N", help="With --to: number of forks.")
@click.option("--start", type=int, metavar="N", help="With --to: number of the first fork. Default: 1.")
@click.option("--to-file", "list_file", type=PATH, metavar="FILE", help="File with one destination a line; - is stdin.")
@click.option(
    "--retry", "earlier", type=ID, metavar="ID", help="Run again the forks of campaign ID that did not succeed."
)
@click.option(
    "--id", "campaign_id", type=ID, metavar="ID", help="Id of the campaign; an id is run only once. Default: random."
)
@domain_option
@click.option("--max-parallel", type=int, metavar="N", help="Run at most N forks at a time.")
@click.option(
    "--on-error",
    type=click.Choice(get_args(OnError)),
    help="continue (default); abort: cancel the campaign when a fork fails.",
)
@click.option("--deadline", type=float, metavar="SECONDS", help="Cancel what is not done after this time.")
@click.option("--local", is_flag=True, help="Run the campaign in this process, without a broker.")
@wait_options
@fork_options
@as_json
def campaign(
    source: str | None,
    earlier: str | None,
    campaign_id: str | None,
    domain: str | None,
    local: bool,
    wait: bool,
    timeout: float | None,
    as_json: bool,
    **fields: Any,
) -> None:
    """Make many forks of one directory.

    Queues a campaign for the workers and prints its id or, with --local, runs it in this process. Name SOURCE and the
    destinations (--to with --count, or --to-file), or an earlier campaign (--retry).
    """
    settings = with_domain(read_settings(), domain)
    campaign_id = campaign_id or uuid.uuid4().hex
    client = queue = None
    if earlier is not None:
        _refuse_options_of_a_request()
        client = connect(settings)
        claim = _claim(client, earlier)
        request = _retry_of(client, earlier, claim)
        if request is None:
            print_message(f"{earlier}: all its forks have succeeded; there is nothing to retry")
            return
        queue = claim["queue"] if domain is None else None  # the domain that sees its guests
    else:
        request = _request(source, fields)
    if local:
        _print_result(_run_here(request, campaign_id), as_json)
        return
    _refuse_invalid(request, campaign_id)
    client = client or connect(settings)
    client.submit_campaign(request, campaign_id, queue)
    if not wait:
        print_json({"id": campaign_id}) if as_json else print_line(campaign_id)
        return
    _print_result(cast("CampaignResult", wait_for_result(client, campaign_id, timeout, queue)), as_json)


@command(
    example="forkvm forks campaign-7 --failed",
    done="The list was printed.",
    codes=(NO_BROKER,),
    of_job=True,
)
@click.argument("campaign_id", type=ID, metavar="ID")
@click.option("--failed", is_flag=True, help="List only the forks that did not succeed.")
@click.option("--json", "as_json", is_flag=True, help="Print each ForkResult as JSON on one line.")
def forks(campaign_id: str, failed: bool, as_json: bool) -> None:
    """List the results of a campaign's forks.

    While the campaign runs, the list has the forks that are done so far.
    """
    client = connect(read_settings())
    if client.results.claims.get(campaign_id) is None:
        if not client.is_known(campaign_id, client.status(campaign_id)):
            refuse_unknown(campaign_id)
        return  # it waits in the queue, or was refused
    for result in client.campaign_forks(campaign_id, _summary(_claim(client, campaign_id))):
        if stdout_failed():
            return
        if not failed or result["status"] != "succeeded":
            print_json(result) if as_json else print_line(fork_line(result))


def _request(source: str | None, fields: dict[str, Any]) -> dict[str, Any]:
    if source is None:
        raise click.UsageError("name SOURCE, or an earlier campaign with --retry")
    request: dict[str, Any] = {"source": absolute(source)}
    if (fields["template"] is None) == (fields["list_file"] is None):
        raise click.UsageError("name the destinations with --to and --count, or with --to-file")
    if fields["list_file"] is not None:
        request["destinations"] = [absolute(line) for line in _lines_of(fields["list_file"])]
    else:
        if fields["count"] is None:
            raise click.UsageError("--to needs --count")
        request["destinations"] = {"template": absolute(fields["template"]), "count": fields["count"]}
        if fields["start"] is not None:
            request["destinations"]["start"] = fields["start"]
    for name in ("max_parallel", "on_error", "deadline"):
        if fields[name] is not None:
            request[name] = fields[name]
    return request_of(request, fields)


def _refuse_invalid(request: dict[str, Any], campaign_id: str) -> None:
    """Raise ForkError invalid_request as a worker would."""
    from tasks.contract.campaign_request import campaign_of

    campaign_of(request, campaign_id, owner="queue")


def _lines_of(name: str) -> list[str]:
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise click.UsageError(f"--to-file {name}: {error.strerror}") from None
    return [line.decode(errors="surrogateescape") for line in data.splitlines() if line]


def _refuse_options_of_a_request() -> None:
    """Raise UsageError for an option that --retry would ignore: the request is that of the earlier campaign."""
    context = click.get_current_context()
    for parameter in context.command.params:
        given = context.get_parameter_source(parameter.name or "") is not ParameterSource.DEFAULT
        if given and parameter.name not in _WITH_RETRY:
            name = parameter.opts[0] if isinstance(parameter, click.Option) else parameter.human_readable_name
            raise click.UsageError(f"--retry uses the request of the earlier campaign; leave out {name}")


def _claim(client: Client, campaign_id: str) -> Claim:
    """The claim of a campaign's id. Raises UsageError if no campaign has the id."""
    claim = client.results.claims.get(campaign_id)
    if claim is None or not claim.get("campaign"):
        raise click.UsageError(f"{campaign_id}: no campaign with this id was started, or its results have expired")
    return claim


def _summary(claim: Claim) -> Summary:
    """The summary of a campaign's request that its claim keeps."""
    return cast("Summary", claim["request"])


def _retry_of(client: Client, campaign_id: str, claim: Claim) -> dict[str, Any] | None:
    """The request for the forks of an earlier campaign that did not succeed; None if all did."""
    summary = _summary(claim)
    if client.results.final.get(campaign_id) is None:
        raise click.UsageError(f"{campaign_id}: the campaign has not ended yet")
    found = list(client.campaign_forks(campaign_id, summary))
    if len(found) < summary["forks"]:
        raise click.UsageError(f"{campaign_id}: the results of some of its forks have expired")
    rest = [result["destination"] for result in found if result["status"] != "succeeded"]
    return {**summary["kept"], "destinations": rest} if rest else None


def _run_here(request: dict[str, Any], campaign_id: str) -> CampaignResult:
    from tasks.contract.campaign_request import campaign_of, refused_campaign
    from tasks.copier.campaign.local import campaign_here
    from tasks.copier.roots import Roots

    settings = read_settings()
    try:
        spec, paths = campaign_of(request, campaign_id, owner="local")
    except ForkError as error:
        return refused_campaign(request, campaign_id, error)
    prepare_io(settings)
    with progress_bar() as show, cancelled_by_signals(show) as poll:
        return campaign_here(spec, paths, Roots(settings.roots), local_processes(), poll, settings.copy_pace)


def _print_result(result: CampaignResult, as_json: bool) -> None:
    if as_json:
        print_json(result)
    else:
        for line in campaign_lines(result):
            print_line(line)
    error = result["error"]
    if error is not None:
        print_message(describe(error))
    if result["status"] != "succeeded":
        refused = error is not None and error["code"] == Code.INVALID_REQUEST and not result["forks"]["total"]
        raise click.exceptions.Exit(BAD_CALL if refused else FAILED)
