"""What becomes of a fork whose holder gives no sign of life: it is taken over, and made anew."""

from __future__ import annotations

import errno
import logging
import os
from typing import Any

from tasks.context import Context
from tasks.copier.errors import Code, ForkError
from tasks.copier.spec import ForkResult, ForkSpec
from tasks.copier.staging import Staging
from tasks.finish import refuse

log = logging.getLogger(__name__)

#: A holder that is not seen to live for so long, in seconds, is taken for paused: five signs of life were left out.
STALE_SECONDS = 10.0


def take_over(context: Context, fork_id: str, destination: str, pulse: int) -> dict[str, Any] | None:
    """Take a fork from paused holders: the request to make it anew, or None where there is nothing to take.

    `pulse`: see `Staging.take_over`.
    """
    try:
        parent_fd, _ = context.roots.open_parent(destination)
    except ForkError:
        return None
    try:
        journal = Staging.take_over(parent_fd, fork_id, pulse)
    finally:
        os.close(parent_fd)
    if journal is None:
        return None
    log.warning("fork %s was taken from a process that has been paused for %.0f s", fork_id, STALE_SECONDS)
    claim = context.results.claim_of(fork_id)
    return claim["request"] if claim is not None else ForkSpec.from_data(journal.spec).request()


def settle_lost(context: Context, fork_id: str, destination: str) -> ForkResult:
    """Settle a fork whose staging someone removed."""
    error = ForkError(Code.IO_ERROR, "its staging directory is gone", destination, errno.ENOENT)
    return refuse(context, ForkSpec(fork_id=fork_id, source="", destination=destination), error)
