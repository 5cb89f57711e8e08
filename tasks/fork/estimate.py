"""`forkvm.estimate`: what a fork would do and cost. It is not a job: it claims no id and changes nothing.

So it may be delivered again, and is then made again. A message that is lost is not found by the sweep.
"""

from __future__ import annotations

import logging
import uuid
from contextlib import suppress
from dataclasses import replace

from redis.exceptions import RedisError

from tasks.context import Context
from tasks.contract import fork_request
from tasks.copier.errors import Code, ForkError, cancelled
from tasks.copier.estimate.estimate import Estimate, estimate
from tasks.copier.progress import Progress
from tasks.fork.foreign_ids import is_of_another_job

log = logging.getLogger(__name__)


def run_estimate(context: Context, task_id: str, request: object, *, expired: bool = False) -> Estimate | None:
    """The Estimate of the fork that `request` asks for. None if a fork or campaign has the id, whose state must stay.

    `expired`: no process should begin with it any more. Raises ForkError.
    """
    claim = context.results.claims.get(task_id)
    if claim is not None or is_of_another_job(context, task_id, claim):
        log.warning("invalid_request: an estimate with the id %r was dropped: a fork or campaign has this id", task_id)
        return None
    spec = fork_request.spec_of(request, f"estimate-{uuid.uuid4().hex}", owner="local")
    if expired:
        raise ForkError(Code.CANCELLED, "its message expired before a worker began with it", spec.destination)
    results = replace(context.results, patient=False)

    def poll(progress: Progress) -> None:
        with suppress(RedisError):
            if results.cancellations.is_requested(task_id):
                raise cancelled(spec.destination)

    return estimate(spec, context.roots, context.limits, poll)
