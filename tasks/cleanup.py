"""Removing what is left of a job that has ended, if a process died after it stored the result."""

from __future__ import annotations

from contextlib import suppress

from tasks.context import Context
from tasks.copier.campaign.finish import remove_annexes
from tasks.copier.campaign.plan import campaign_in
from tasks.copier.errors import ForkError
from tasks.copier.staging.control_directory import Held
from tasks.copier.staging.staging import Staging

#: How long to wait for a process that holds the staging, in seconds. A process that ran into its time limit is killed
#: only after its message is back in the queue; billiard kills such processes one after another, 0.1 s each.
_HELD_WAIT = 5.0


def remove_leftovers(context: Context, job_id: str, destination: str) -> None:
    """Remove the staging of a fork or campaign whose result is stored, and all trees that were not published.

    Waits up to `_HELD_WAIT` for a process that holds the staging. `gc` removes later what cannot be removed now.
    """
    with (
        suppress(ForkError, OSError, Held),
        context.roots.open_parent(destination) as parent,
        Staging.attach(parent.fd, job_id, _HELD_WAIT, alone=True) as staging,
    ):
        if staging is None:
            return
        campaign = campaign_in(staging)
        if campaign is not None:
            remove_annexes(campaign, context.roots)
        else:
            staging.discard_trees()
        staging.remove()
