"""Remote-control commands that replace Celery's: revoking cancels a job; a queue comes with its inner queues.

Another application on the Redis database broadcasts its commands to these workers too. So they take no queue but those
of this program, keep a pool process, and refuse an argument of a wrong type, which would end the worker later.

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
from math import inf
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
from tasks.names import DOMAIN_QUEUE, PART_ID, inner_queues
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
#: The longest part of a wrong argument that an answer repeats, in characters.
_LONGEST_NAME = 100


def register_remote_control() -> None:
    """Replace Celery's commands in this process."""
    jobs, queues = (revoke, terminate, revoke_by_stamped_headers), (add_consumer, cancel_consumer)
    for command in (*jobs, *queues, pool_grow, pool_shrink, rate_limit, time_limit, stats):
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


def add_consumer(worker: Any, queue: Any, **_: Any) -> Answer:
    """Consume another domain's queue and its inner queues.

    No other queue: the messages of another application would be refused, and so be lost.
    """
    if (refusal := _refused_queue(queue)) is not None:
        return refusal
    answer: Answer = _celery.add_consumer(worker, queue)
    for inner in inner_queues(queue):
        _celery.add_consumer(worker, inner)
    return answer


def cancel_consumer(worker: Any, queue: Any, **_: Any) -> Answer:
    """Stop consuming a domain's queue and its inner queues."""
    if (refusal := _refused_queue(queue)) is not None:
        return refusal
    for inner in inner_queues(queue):
        _celery.cancel_consumer(worker, inner)
    answer: Answer = _celery.cancel_consumer(worker, queue)
    return answer


def _refused_queue(queue: object) -> Answer | None:
    """The answer for what is not the queue of a domain; None for one that is."""
    if not isinstance(queue, str):
        return {"error": f"the queue must be a name, not a {type(queue).__name__}"}
    if not DOMAIN_QUEUE.fullmatch(queue):
        return {"error": f"forkvm serves the queues forkvm and forkvm.DOMAIN, not {queue[:_LONGEST_NAME]!r}"}
    return None


def pool_grow(worker: Any, n: Any = 1, **_: Any) -> Answer:
    """Add pool processes."""
    if not _is_number(n):
        return _no_number(n)
    answer: Answer = _celery.pool_grow(worker, n)
    return answer


def pool_shrink(worker: Any, n: Any = 1, **_: Any) -> Answer:
    """End idle pool processes, but not the last one.

    Without any, the worker would keep the messages that it has taken, and renew their leases.
    """
    if not _is_number(n):
        return _no_number(n)
    if n >= worker.consumer.pool.num_processes:
        return {"error": "a worker keeps at least one pool process; end it with the command shutdown"}
    answer: Answer = _celery.pool_shrink(worker, n)
    return answer


def rate_limit(worker: Any, **_: Any) -> Answer:
    """An error: a worker would keep the messages that are over the limit, while other workers are idle."""
    return {"error": "forkvm has no rate limits for tasks; set FORKVM_CONCURRENCY or FORKVM_COPY_RATE"}


def time_limit(worker: Any, task_name: Any = None, hard: Any = None, soft: Any = None, **_: Any) -> Answer:
    """Set the time limits of a task, in seconds; none without a value."""
    for limit in (hard, soft):
        if limit is not None and (type(limit) not in (int, float) or not 0 < limit < inf):
            return {"error": "a time limit must be a number of seconds above 0, or nothing"}
    if not isinstance(task_name, str):
        return {"error": f"the task must be a name, not a {type(task_name).__name__}"}
    answer: Answer = _celery.time_limit(worker, task_name, hard=hard, soft=soft)
    return answer


def _is_number(n: object) -> bool:
    return type(n) is int and n > 0


def _no_number(n: object) -> Answer:
    return {"error": f"the number of pool processes must be a whole number above 0, not {str(n)[:_LONGEST_NAME]}"}


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
