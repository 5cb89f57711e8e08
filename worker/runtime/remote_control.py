"""Remote-control commands that replace Celery's: revoking cancels a job; a queue comes with its inner queues.

The statistics of a worker also have a field of this program, which `forkvm queues` reads. A command of its own would be
logged as an error by the workers of other applications on the Redis database.

`is_well_formed` checks the messages of remote control and events before kombu and Celery read them.
"""

from __future__ import annotations

import base64
import json
import logging
import time
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from celery.utils.functional import maybe_list
from celery.worker import control, state
from celery.worker.control import Panel
from kombu.exceptions import OperationalError
from pydantic import BaseModel, ConfigDict, Field, InstanceOf, ValidationError
from redis.exceptions import RedisError

from tasks.delivery.backend import results_of
from tasks.delivery.cancel import cancel_job
from tasks.delivery.message import Message
from tasks.names import PART_ID, inner_queues
from tasks.store.redis_errors import cause
from tasks.store.results import Results
from worker.runtime.bootsteps import Lease
from worker.runtime.own_record import own_record

log = logging.getLogger(__name__)

Answer = dict[str, Any]
#: The field of this program in the answer to `stats`.
STATS_FIELD = "forkvm"
#: Celery's commands, which celery-types does not declare.
_celery: Any = control


def register_remote_control() -> None:
    """Replace Celery's commands in this process."""
    for command in (revoke, terminate, revoke_by_stamped_headers, add_consumer, cancel_consumer, stats):
        Panel.data[command.__name__] = command


def revoke(worker: Any, task_id: Any, terminate: bool = False, signal: Any = None, **_: Any) -> Answer:
    """Cancel forks and campaigns by their ids, started or not.

    No process is killed. A process that runs a fork checks for a cancellation several times a second, and then removes
    what it made.
    """
    return _cancel(worker.app, map(str, maybe_list(task_id) or []))


def terminate(worker: Any, signal: Any = None, task_id: Any = None, **_: Any) -> Answer:
    """The same as `revoke`."""
    return revoke(worker, task_id)


def revoke_by_stamped_headers(
    worker: Any, headers: Any, terminate: bool = False, signal: Any = None, **_: Any
) -> Answer:
    """Cancel the running and future forks and campaigns whose messages have one of these stamps."""
    answer: Answer = _celery.revoke_by_stamped_headers(worker, headers)
    running = [request for request in list(state.requests.values()) if isinstance(request, Message)]
    _cancel(worker.app, [request.job_id for request in running if request.is_revoked()])
    return answer


def add_consumer(worker: Any, queue: Any, **options: Any) -> Answer:
    """Consume another domain's queue and its inner queues."""
    if not isinstance(queue, str):
        return _no_name(queue)
    answer: Answer = _celery.add_consumer(worker, queue, **options)
    for inner in inner_queues(queue):
        _celery.add_consumer(worker, inner)
    return answer


def cancel_consumer(worker: Any, queue: Any, **_: Any) -> Answer:
    """Stop consuming a domain's queue and its inner queues."""
    if not isinstance(queue, str):
        return _no_name(queue)
    for inner in inner_queues(queue):
        _celery.cancel_consumer(worker, inner)
    answer: Answer = _celery.cancel_consumer(worker, queue)
    return answer


def _no_name(queue: object) -> Answer:
    return {"error": f"the queue must be a name, not a {type(queue).__name__}"}


def stats(worker: Any, **_: Any) -> Answer:
    """Celery's statistics, and what `worker.overview.Worker` has of this worker, without its name."""
    answer: Answer = _celery.stats(worker)
    record = own_record(worker.consumer)
    answer[STATS_FIELD] = {
        "version": record.version,
        "queues": record.queues,
        "children": record.children,
        "busy": min(record.children, len(state.active_requests)),
        "heartbeat_seconds": round(time.monotonic() - Lease.renewed_at, 3),
    }
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
        log.warning("remote control: some of the revoked jobs were not cancelled: %s", cause(error))
        return {"error": f"Redis did not accept the cancellation: {cause(error)}"}
    log.info("remote control: cancellation requested: %s", ", ".join(map(repr, cancelled)))
    return {"ok": f"cancellation requested: {', '.join(cancelled)}"}


def _job_of(results: Results, task_id: str) -> str:
    """The id of the fork or campaign that the message `task_id` is a part of; `task_id` itself if none is known."""
    request = state.requests.get(task_id)
    if isinstance(request, Message):
        return request.job_id
    part = PART_ID.fullmatch(task_id)
    return part[1] if part and results.claims.get(task_id) is None and results.claims.get(part[1]) else task_id


# -- messages


class _Properties(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    delivery_tag: InstanceOf[str]
    delivery_info: dict[str, Any]
    body_encoding: Literal["base64"] | None = None


class _ControlMessage(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    body: InstanceOf[str]
    content_type: Annotated[Literal["application/json"], Field(alias="content-type")]
    content_encoding: Annotated[Literal["utf-8"], Field(alias="content-encoding")]
    headers: dict[str, Any]
    properties: _Properties


def is_well_formed(message: Any) -> bool:
    """Whether kombu and Celery can read this message of remote control or events, as kombu has decoded it.

    A malformed one would end the worker, or be logged with its content.
    """
    try:
        parsed = _ControlMessage.model_validate(message)
        body: str | bytes = parsed.body
        if parsed.properties.body_encoding is not None:
            body = base64.b64decode(body, validate=True)
        return isinstance(json.loads(body), dict | list)
    except (ValidationError, ValueError, RecursionError):
        return False
