"""The result of a job whose message is refused.

The refused message is replaced by one with the same task and id, whose request contains only the reason. A pool process
handles it like any request. If another request has the id, or the job has ended, nothing changes. Otherwise the job
ends as FAILURE with the code `invalid_request`, and its client can read the reason.
"""

from __future__ import annotations

import base64
import json
import uuid
from typing import Any, NamedTuple

from tasks.contract.raw_request import REFUSED, text_of
from tasks.delivery.backend import UUID_ID
from tasks.delivery.signatures import BadSignature, followers_of
from tasks.names import CLIENT_TASKS, job_fields

#: Longest id under which a result is stored, in characters. The limit for a fork's id is lower.
LONGEST_RESULT_ID = 4096
#: Longest path of a refused request that is copied to its result, in characters.
_LONGEST_PATH = 4096
#: Longest body that is decoded to find the id of a message of protocol 1, in characters.
_LONGEST_OLD_BODY = 1 << 20


class Body(NamedTuple):
    """The decoded body of a message of Celery's protocol 2."""

    args: list[Any]
    kwargs: dict[str, Any]
    options: dict[str, Any]


class Refused(Exception):
    """The message is refused. The text is the reason, without contents of the message; `body` is its body if known.

    `kind` is one of `tasks.events.REASONS`.
    """

    def __init__(self, reason: str, body: Body | None = None, kind: str = "malformed") -> None:
        super().__init__(reason)
        self.body = body
        self.kind = kind


def id_of(message: Any) -> str | None:
    """The id under which a result for the message's client can be stored; None if there is none."""
    found = _task_and_id(message)
    return found[1] if found is not None else None


def log_fields_of(message: Any) -> dict[str, str]:
    """The fields of a log line about the message, also about one to an unknown task; none if it has no usable id."""
    task, job_id = _named(message)
    is_usable = isinstance(task, str) and isinstance(job_id, str) and 0 < len(job_id) <= LONGEST_RESULT_ID
    return job_fields(task, job_id) if is_usable else {}


def replacement(message: Any, refusal: Refused, queue: str) -> dict[str, Any] | None:
    """The message that is taken in place of a refused one and ends its job; None if it has no usable task and id."""
    found = _task_and_id(message)
    if found is None:
        return None
    task, job_id = found
    args, kwargs, options = refusal.body or Body([], {}, {})
    given = kwargs.get("request", args[0] if args else None)
    request = {REFUSED: str(refusal)}
    for field in ("source", "destination"):
        path = text_of(given, field)
        if path and len(path) <= _LONGEST_PATH:
            request[field] = path
    body = json.dumps([[], {"request": request}, _followers(options)]).encode()
    return {
        "body": base64.b64encode(body).decode("ascii"),
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": {"lang": "py", "task": task, "id": job_id, "root_id": job_id, "parent_id": None}
        | ({UUID_ID: True} if has_uuid(message) else {})
        | _group(message.get("headers")),
        "properties": {
            "correlation_id": job_id,
            "delivery_mode": 2,
            "body_encoding": "base64",
            "delivery_tag": str(uuid.uuid4()),
            "delivery_info": {"exchange": "", "routing_key": queue},
        },
    }


def has_uuid(message: Any) -> bool:
    """Whether its id is not text, but a UUID as kombu's JSON writes one: its client passed an object as `task_id`."""
    headers = message.get("headers") if isinstance(message, dict) else None
    return isinstance(headers, dict) and isinstance(headers.get("id"), uuid.UUID)


def _followers(options: dict[str, Any]) -> dict[str, Any]:
    try:
        return followers_of(options)
    except BadSignature:
        return {}


def _group(headers: Any) -> dict[str, Any]:
    """The message's group and its index in it, which a chord counts."""
    group, index = headers.get("group"), headers.get("group_index")
    if not isinstance(group, str):
        return {}
    return {"group": group} | ({"group_index": index} if type(index) is int else {})


def _task_and_id(message: Any) -> tuple[str, str] | None:
    """The task and the id of a message to a task of the contract."""
    task, job_id = _named(message)
    if task not in CLIENT_TASKS or not isinstance(job_id, str) or not 0 < len(job_id) <= LONGEST_RESULT_ID:
        return None
    try:
        job_id.encode()
    except UnicodeEncodeError:  # a surrogate, which a key in Redis cannot contain
        return None
    return task, job_id


def _named(message: Any) -> tuple[Any, Any]:
    """What a message has as its task and its id. Protocol 1 has both in its body."""
    headers = message.get("headers") if isinstance(message, dict) else None
    if not isinstance(headers, dict):
        return None, None
    found = headers if headers.get("task") is not None else old_body(message) or {}
    job_id = found.get("id")
    return found.get("task"), str(job_id) if isinstance(job_id, uuid.UUID) else job_id  # a type of kombu's JSON


def old_body(message: dict[str, Any]) -> dict[str, Any] | None:
    """The body of a message of protocol 1; None for other messages."""
    body, properties = message.get("body"), message.get("properties")
    if not isinstance(body, str) or len(body) > _LONGEST_OLD_BODY or not isinstance(properties, dict):
        return None
    try:
        decoded = json.loads(base64.b64decode(body) if properties.get("body_encoding") == "base64" else body)
    except (ValueError, RecursionError):
        return None
    return decoded if isinstance(decoded, dict) and "task" in decoded else None
