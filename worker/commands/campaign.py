"""The commands of campaigns: `forkvm campaign` and `forkvm forks`."""

from __future__ import annotations

import sys
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click
from click.core import ParameterSource

from tasks.contract.campaign_request import Summary, campaign_of, refused_campaign
from tasks.copier.campaign.local import campaign_here
from tasks.copier.campaign.spec import CampaignResult
from tasks.copier.errors import Code, ForkError, describe
from worker.commands.options import (
    BAD_CALL,
    FAILED,
    absolute,
    as_json,
    connect,
    fork_options,
    local_processes,
    request_of,
    with_domain,
)
from worker.commands.output import campaign_lines, fork_line, progress_bar
from worker.commands.signals import ended_by_signals
from worker.commands.streams import reader_is_gone
from worker.commands.waiting import wait_for_result, wait_options
from worker.settings import read_settings, roots_of
from worker.terminal import answer, answer_json, say

if TYPE_CHECKING:
    from tasks.store.claims import Claim
    from worker.client import Client

#: The parameters that say something of a retry, and not of what is to be done.
_WITH_RETRY = frozenset({"earlier", "campaign_id", "domain", "local", "wait", "timeout", "as_json"})


@click.command()
@click.argument("source", required=False)
@click.option("--to", "template", metavar="TEMPLATE", help="Destinations: a path with {n}, as in 'DIR/vm-{n:04}'.")
@click.option("--count", type=int, help="How many, with --to.")
@click.option("--start", type=int, help="The first n, with --to; 1 by default.")
@click.option("--to-file", "list_file", metavar="FILE", help="Destinations: one path a line; - is stdin.")
@click.option("--retry", "earlier", metavar="ID", help="What has not succeeded of an earlier campaign, as one anew.")
@click.option("--id", "campaign_id", help="The campaign's id, and its idempotency key; made up by default.")
@click.option("--domain", help="The domain that is to make it.")
@click.option("--max-parallel", type=int, help="Forks in flight at most.")
@click.option("--on-error", help="continue (default) or abort, with the first fork that fails.")
@click.option("--deadline", type=float, help="Seconds, after which what is not done is cancelled.")
@click.option("--local", is_flag=True, help="Make it here, without a broker.")
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
    """Make many forks of SOURCE: enqueue them for the workers, or make them here."""
    settings = with_domain(read_settings(), domain)
    campaign_id = campaign_id or uuid.uuid4().hex
    client = queue = None
    if earlier is not None:
        _refuse_other_wishes()
        client = connect(settings)
        claim = _claim(client, earlier)
        request = _retry_of(client, earlier, claim)
        if request is None:
            say(f"{earlier}: every fork of it has succeeded; there is nothing to do again")
            return
        queue = claim["queue"] if domain is None else None  # its guests lie where its domain sees them
    else:
        request = _request(source, fields)
    if local:
        _answer(_make_here(request, campaign_id), as_json)
        return
    campaign_of(request, campaign_id, owner="queue")  # what is wrong with it, the caller learns here
    client = client or connect(settings)
    client.submit_campaign(request, campaign_id, queue)
    if not wait:
        answer_json({"id": campaign_id}) if as_json else answer(campaign_id)
        return
    _answer(cast(CampaignResult, wait_for_result(client, campaign_id, timeout, queue)), as_json)


@click.command()
@click.argument("campaign_id", metavar="ID")
@click.option("--failed", is_flag=True, help="Only the forks that did not succeed.")
@click.option("--json", "as_json", is_flag=True, help="One ForkResult, as JSON, a line.")
def forks(campaign_id: str, failed: bool, as_json: bool) -> None:
    """The results of a campaign's forks, in order, as many as there are by now."""
    client = connect(read_settings())
    for result in client.campaign_forks(campaign_id, _summary(_claim(client, campaign_id))):
        if reader_is_gone():
            return
        if not failed or result["status"] != "succeeded":
            answer_json(result) if as_json else answer(fork_line(result))


def _request(source: str | None, fields: dict[str, Any]) -> dict[str, Any]:
    if source is None:
        raise click.UsageError("name the SOURCE, or an earlier campaign with --retry")
    ends: dict[str, Any] = {"source": absolute(source)}
    if (fields["template"] is None) == (fields["list_file"] is None):
        raise click.UsageError("name the destinations: --to with --count, or --to-file")
    if fields["list_file"] is not None:
        ends["destinations"] = [absolute(line) for line in _lines_of(fields["list_file"])]
    else:
        if fields["count"] is None:
            raise click.UsageError("--to wants --count")
        ends["destinations"] = {"template": absolute(fields["template"]), "count": fields["count"]}
        if fields["start"] is not None:
            ends["destinations"]["start"] = fields["start"]
    for name in ("max_parallel", "on_error", "deadline"):
        if fields[name] is not None:
            ends[name] = fields[name]
    return request_of(ends, fields)


def _lines_of(name: str) -> list[str]:
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise click.UsageError(f"--to-file {name}: {error.strerror}") from None
    return [line.decode(errors="surrogateescape") for line in data.splitlines() if line]


def _refuse_other_wishes() -> None:
    """A retry asks for what the earlier campaign asked for. Raises UsageError for what it would leave unheard."""
    context = click.get_current_context()
    for parameter in context.command.params:
        given = context.get_parameter_source(parameter.name or "") is not ParameterSource.DEFAULT
        if given and parameter.name not in _WITH_RETRY:
            name = parameter.opts[0] if isinstance(parameter, click.Option) else parameter.human_readable_name
            raise click.UsageError(f"--retry does what the earlier campaign was to do; leave out {name}")


def _claim(client: Client, campaign_id: str) -> Claim:
    """What is kept of who has the id. Raises UsageError for an id that is no campaign's."""
    claim = client.results.claims.get(campaign_id)
    if claim is None or not claim.get("campaign"):
        raise click.UsageError(f"{campaign_id}: no campaign of this id was begun, or its results have expired")
    return claim


def _summary(claim: Claim) -> Summary:
    """What is kept of a campaign's request."""
    return cast(Summary, claim["request"])


def _retry_of(client: Client, campaign_id: str, claim: Claim) -> dict[str, Any] | None:
    """The request for the forks of an earlier campaign that did not succeed; None where all did."""
    summary = _summary(claim)
    if client.results.final.get(campaign_id) is None:
        raise click.UsageError(f"{campaign_id}: it has not ended yet")
    found = list(client.campaign_forks(campaign_id, summary))
    if len(found) < summary["forks"]:
        raise click.UsageError(f"{campaign_id}: the results of some of its forks have expired")
    rest = [result["destination"] for result in found if result["status"] != "succeeded"]
    return {**summary["kept"], "destinations": rest} if rest else None


def _make_here(request: dict[str, Any], campaign_id: str) -> CampaignResult:
    settings = read_settings()
    try:
        spec, paths = campaign_of(request, campaign_id, owner="local")
    except ForkError as error:
        return refused_campaign(request, campaign_id, error)
    with progress_bar() as show, ended_by_signals(show) as beat:
        return campaign_here(spec, paths, roots_of(settings), local_processes(), beat)


def _answer(result: CampaignResult, as_json: bool) -> None:
    if as_json:
        answer_json(result)
    else:
        for line in campaign_lines(result):
            answer(line)
    error = result["error"]
    if error is not None:
        say(describe(error))
    if result["status"] != "succeeded":
        refused = error is not None and error["code"] == Code.INVALID_REQUEST and not result["forks"]["total"]
        raise click.exceptions.Exit(BAD_CALL if refused else FAILED)
