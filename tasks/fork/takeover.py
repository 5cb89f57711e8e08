"""What becomes of a fork whose holder gives no sign of life: it is taken over, and made anew, or its end is told."""

from __future__ import annotations

import errno
import logging
from contextlib import suppress
from typing import Any

from tasks.context import Context
from tasks.copier.errors import Code, ForkError, cancelled
from tasks.copier.fork_spec import ForkResult, ForkSpec, result_of
from tasks.copier.staging import takeover
from tasks.fork.finish import is_asked_for, refuse, unknown_spec

log = logging.getLogger(__name__)

#: A holder that is not seen to live for so long, in seconds, is taken for paused: five signs of life were left out.
STALE_SECONDS = 10.0


def take_over(context: Context, fork_id: str, destination: str, heartbeat: int | None) -> dict[str, Any] | None:
    """Take a fork from paused holders: the request to make it anew, or None where there is nothing to take.

    `heartbeat`: see `tasks.copier.staging.takeover`.
    """
    try:
        with context.roots.open_parent(destination) as parent:
            taken = takeover.take_over(parent.fd, fork_id, heartbeat)
    except (ForkError, OSError):  # not ours: the next delivery of the fork reports it
        return None
    if taken is None:
        return None
    log.warning("fork %s was taken from a process that has been paused for %.0f s", fork_id, STALE_SECONDS)
    claim = context.results.claims.get(fork_id)
    if claim is not None:
        request: dict[str, Any] = claim["request"]
        return request
    with suppress(ForkError):
        return ForkSpec.from_data(taken.journal.spec).request() if taken.journal is not None else None
    return None


def store_published(context: Context, fork_id: str, destination: str) -> bool:
    """Settle a fork that its holder published before it was paused; whether that was so."""
    try:
        with (
            context.roots.open_parent(destination) as parent,
            takeover.published(parent.fd, fork_id, parent.name) as journal,
        ):
            if journal is None or not is_asked_for(context, journal, fork_id, destination):
                return False
            spec = ForkSpec.from_data(journal.spec)
            context.ledger(spec, parent.fd, parent.name).store_result(result_of(journal.result, spec))
            return True
    except (ForkError, OSError):  # not ours: the next delivery of the fork reports it
        return False


def store_lost(context: Context, fork_id: str, destination: str) -> ForkResult:
    """Settle a fork whose staging someone removed."""
    error = ForkError(Code.IO_ERROR, "its staging directory is gone", destination, errno.ENOENT)
    if context.results.cancellations.is_requested(fork_id):
        error = cancelled(destination)
    return refuse(context, unknown_spec(context, fork_id, destination), error)
