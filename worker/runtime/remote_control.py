"""Celery's remote control, as far as this program has its own: revoking is cancelling, and a queue brings its own."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from typing import Any

from celery.utils.functional import maybe_list
from celery.worker import control, state
from celery.worker.control import Panel
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from tasks.delivery.backend import results_of
from tasks.delivery.cancel import cancel_job
from tasks.delivery.message import Message
from tasks.names import inner_queues
from tasks.store.redis_errors import cause
from tasks.store.results import Results

log = logging.getLogger(__name__)

Answer = dict[str, Any]
#: The id of a message that this program sent for a part of a job.
_PART = re.compile(r"(.+)\.(?:chunk|batch)\.[0-9]+", re.DOTALL)
#: Celery's own commands; celery-types does not know them.
_celery: Any = control


def register_remote_control() -> None:
    """Put this program's commands in the place of Celery's."""
    for command in (revoke, terminate, revoke_by_stamped_headers, add_consumer, cancel_consumer):
        Panel.data[command.__name__] = command


def revoke(worker: Any, task_id: Any, terminate: bool = False, signal: Any = None, **_: Any) -> Answer:
    """Cancel forks and campaigns by their ids, begun or not.

    No process is killed: the one that works on a fork looks for the request several times a second, and removes what
    it made.
    """
    return _cancel(worker.app, map(str, maybe_list(task_id) or []))


def terminate(worker: Any, signal: Any = None, task_id: Any = None, **_: Any) -> Answer:
    """As `revoke`."""
    return revoke(worker, task_id)


def revoke_by_stamped_headers(
    worker: Any, headers: Any, terminate: bool = False, signal: Any = None, **_: Any
) -> Answer:
    """Cancel the forks and campaigns whose messages carry one of these stamps, at work or still to come."""
    answer: Answer = _celery.revoke_by_stamped_headers(worker, headers)
    at_work = [request for request in list(state.requests.values()) if isinstance(request, Message)]
    _cancel(worker.app, [request.job_id for request in at_work if request.is_revoked()])
    return answer


def add_consumer(worker: Any, queue: str, **options: Any) -> Answer:
    """Consume another domain's queue, and with it the queues for the chunks and ends of its forks."""
    answer: Answer = _celery.add_consumer(worker, queue, **options)
    for inner in inner_queues(queue):
        _celery.add_consumer(worker, inner)
    return answer


def cancel_consumer(worker: Any, queue: str, **_: Any) -> Answer:
    """Stop consuming a domain's queue and those that belong to it."""
    for inner in inner_queues(queue):
        _celery.cancel_consumer(worker, inner)
    answer: Answer = _celery.cancel_consumer(worker, queue)
    return answer


def _cancel(app: Any, ids: Iterable[str]) -> Answer:
    results = results_of(app, patient=False)
    cancelled = []
    try:
        for task_id in ids:
            job_id = _job_of(results, task_id)
            cancel_job(app, results, job_id)
            cancelled.append(job_id)
    except (RedisError, OperationalError, OSError) as error:
        log.warning("not everything was cancelled that was revoked: %s", cause(error))
        return {"error": f"Redis did not take the cancellation: {cause(error)}"}
    log.info("cancellation requested by remote control: %s", ", ".join(map(repr, cancelled)))
    return {"ok": f"cancellation requested: {', '.join(cancelled)}"}


def _job_of(results: Results, task_id: str) -> str:
    """The fork or campaign that a message is a part of, whose id is `task_id`; that id itself where none is known."""
    request = state.requests.get(task_id)
    if isinstance(request, Message):
        return request.job_id
    part = _PART.fullmatch(task_id)
    return part[1] if part and results.claims.get(task_id) is None and results.claims.get(part[1]) else task_id
