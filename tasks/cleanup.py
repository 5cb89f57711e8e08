"""What is left of a job that has ended, by a process that died between its result and its end."""

from __future__ import annotations

import os
from contextlib import suppress

from tasks.context import Context
from tasks.copier.campaign.finish import remove_annexes
from tasks.copier.campaign.plan import campaign_in
from tasks.copier.errors import ForkError
from tasks.copier.staging.control_directory import Held
from tasks.copier.staging.staging import Staging

#: How long to wait for a process that holds the staging, in seconds. One that took too long is killed only after its
#: message is back in the queue, and billiard takes 0.1 s for each of those that did at one time.
_HELD_WAIT = 5.0


def remove_leftovers(context: Context, job_id: str, destination: str) -> None:
    """Remove the staging of a fork or campaign that has its result, with all trees that were not published.

    Waits for whoever holds it, for seconds. What cannot be removed then, `gc` removes later.
    """
    with suppress(ForkError, OSError, Held):
        parent_fd, _ = context.roots.open_parent(destination)
        try:
            with Staging.attach(parent_fd, job_id, _HELD_WAIT, alone=True) as staging:
                if staging is not None:
                    campaign = campaign_in(staging)
                    if campaign is not None:
                        remove_annexes(campaign, context.roots)
                    else:
                        staging.discard_trees()
                    staging.remove()
        finally:
            os.close(parent_fd)
