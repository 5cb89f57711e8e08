"""Taking a fork from a process that holds it and gives no heartbeat: the fork is made again, or its end is stored."""

from __future__ import annotations

import errno
import logging
from contextlib import suppress
from typing import Any

from tasks import events
from tasks.context import Context
from tasks.copier.errors import Code, ForkError, cancelled
from tasks.copier.fork_spec import ForkResult, ForkSpec, result_of
from tasks.copier.staging import takeover
from tasks.delivery.outcome import RetryLater
from tasks.fork.ending import is_of_claim, spec_from_claim, store_failure
from tasks.names import FINISH_TASK, FORK_TASK

log = logging.getLogger(__name__)


def take_over(context: Context, fork_id: str, destination: str, heartbeat: int | None) -> ForkResult | None:
    """Take a fork from its stale holder; `heartbeat` is the holder's last one, or None if there is no staging.

    Returns the fork's result, or None if another task was sent that continues it. Raises RetryLater if there is nothing
    to take.
    """
    request = _take_request(context, fork_id, destination, heartbeat)
    if request is not None:
        context.send(FORK_TASK, {"request": request}, fork_id)
        return None
    if heartbeat is None:
        return _store_removed(context, fork_id, destination)
    if store_published(context, fork_id, destination):
        _note(fork_id)
        context.send(FINISH_TASK, {"destination": destination}, fork_id)  # it stores the result as the fork's state
        return None
    raise RetryLater(heartbeat)


def _take_request(context: Context, fork_id: str, destination: str, heartbeat: int | None) -> dict[str, Any] | None:
    """Take the fork's staging from its holder: the request to make the fork again, or None if nothing was taken."""
    try:
        with context.roots.open_parent(destination) as parent:
            taken = takeover.take_over(parent.fd, fork_id, heartbeat)
    except (ForkError, OSError):  # not the worker's own: the fork's next delivery fails for that
        return None
    if taken is None:
        return None
    _note(fork_id)
    claim = context.results.claims.get(fork_id)
    if claim is not None:
        request: dict[str, Any] = claim["request"]
        return request
    with suppress(ForkError):
        return ForkSpec.from_data(taken.journal.spec).request() if taken.journal is not None else None
    return None


def _note(fork_id: str) -> None:
    log.warning("fork %s was taken from a process that gave no heartbeat", fork_id)
    events.happened("takeover")


def store_published(context: Context, fork_id: str, destination: str) -> bool:
    """Store the result of a fork that its holder published before it was paused; False if it is not published."""
    try:
        with (
            context.roots.open_parent(destination) as parent,
            takeover.published(parent.fd, fork_id, parent.name) as journal,
        ):
            if journal is None or not is_of_claim(context, journal, fork_id, destination):
                return False
            spec = ForkSpec.from_data(journal.spec)
            context.ledger(spec, parent.fd, parent.name).store_result(result_of(journal.result, spec))
            return True
    except (ForkError, OSError):  # not the worker's own: the fork's next delivery fails for that
        return False


def _store_removed(context: Context, fork_id: str, destination: str) -> ForkResult:
    """Store the failure of a fork whose staging someone removed."""
    error = ForkError(Code.IO_ERROR, "its staging directory was removed", destination, errno.ENOENT)
    if context.results.cancellations.is_requested(fork_id):
        error = cancelled(destination)
    return store_failure(context, spec_from_claim(context, fork_id, destination), error)
