"""The command `forkvm report`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from worker.commands.help import command
from worker.commands.options import ID, PATH, as_json, connect
from worker.commands.waiting import is_over, refuse_unknown
from worker.exit_codes import FAILED, NO_BROKER
from worker.settings import read_settings
from worker.terminal.printing import print_json, print_message

if TYPE_CHECKING:
    from tasks.contract.campaign_request import Summary
    from tasks.copier.campaign.spec import CampaignResult
    from tasks.copier.fork_spec import ForkResult
    from worker.client import Client
    from worker.commands.report.contents import Contents


@command(
    example="forkvm report vm-2 -o vm-2.html",
    done="The report was written.",
    failed="The job has not ended, or FILE cannot be written.",
    codes=(NO_BROKER,),
    of_job=True,
)
@click.argument("job_id", type=ID, metavar="ID")
@click.option(
    "-o", "--output", type=PATH, metavar="FILE", required=True, help="The page; an existing file is replaced."
)
@as_json
def report(job_id: str, output: str, as_json: bool) -> None:
    """Write an HTML page about a fork or campaign.

    The page is one file without scripts, and loads nothing. It has the outcome, the time of each phase, how files were
    cloned, the slowest ones, and each failure with what to do.
    """
    from worker.commands.report.page import page

    client = connect(read_settings())
    status = client.status(job_id)
    if status.result is None:
        if not client.is_known(job_id, status):
            refuse_unknown(job_id)
        state = f"{job_id}: it has not ended ({status.state}); to wait for it: forkvm status --watch"
        if is_over(status):
            state = f"{job_id}: {status.state} without a result; see the worker's log"
        print_message(state)
        raise click.exceptions.Exit(FAILED)
    text = page(_contents(client, job_id, status.result))
    Path(output).write_text(text, encoding="utf-8")
    if as_json:
        print_json({"id": job_id, "status": status.result["status"], "file": os.path.abspath(output)})


def _contents(client: Client, job_id: str, result: ForkResult | CampaignResult) -> Contents:
    from worker.commands.report.contents import contents_of_campaign, contents_of_fork

    if "campaign_id" not in result:
        return contents_of_fork(result, client.results.pages.files(job_id))
    claim = client.results.claims.get(job_id)
    forks = () if claim is None else client.campaign_forks(job_id, cast("Summary", claim["request"]))
    return contents_of_campaign(result, forks)
