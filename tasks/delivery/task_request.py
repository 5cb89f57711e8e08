"""What a running task reads from its own message."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from celery import Task

from tasks.names import domain_of

AnyTask = Task[Any, Any]
#: https://www.w3.org/TR/trace-context/#traceparent-header, version 00.
_TRACEPARENT = re.compile(r"00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


def job_id(task: AnyTask) -> str:
    """The task's id. It is the id of the job in all tasks that can end a job."""
    return str(task.request.id)


def request_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The one argument of a task of the contract, `request`. None if the message has other arguments."""
    given = [*args, *kwargs.values()]
    return given[0] if len(given) == 1 and set(kwargs) <= {"request"} else None


def domain_queue(task: AnyTask) -> str:
    """The queue of the domain that the message came from."""
    delivery: Mapping[str, Any] = task.request.delivery_info or {}
    return domain_of(str(delivery["routing_key"]))


def tag_for_others(task: AnyTask) -> str | None:
    """The beginning of the delivery tags of further messages that the task may take; None if it must not take any."""
    return getattr(task.request, "tag_for_others", None)


def trace_headers(task: AnyTask) -> dict[str, str]:
    """The header with which a client linked the job to its trace, for further messages of the job; {} without one."""
    parent = getattr(task.request, "traceparent", None)
    return {"traceparent": parent} if isinstance(parent, str) and _TRACEPARENT.fullmatch(parent) else {}


def is_expired(task: AnyTask) -> bool:
    """Whether the time has passed by which the client wanted the job to begin (`expires` in its message)."""
    expires: Any = task.request.expires
    if expires is None:
        return False
    moment = datetime.fromisoformat(expires)
    return datetime.now(UTC) > (moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC))


def seconds_queued(task: AnyTask) -> float:
    """How long the message waited, in seconds: since its header `sent_at`, or else since the worker received it."""
    return seconds_since(getattr(task.request, "sent_at", None), getattr(task.request, "received_at", None))


def seconds_since(sent: Any, received: float | None) -> float:
    """Seconds since the value of a client's header `sent_at` if that is a time, or else since `received`."""
    began = sent if isinstance(sent, int | float) else received
    return max(0.0, time.time() - began) if began is not None else 0.0
