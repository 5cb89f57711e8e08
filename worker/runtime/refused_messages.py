"""The end of a job whose message is refused: its client is told why.

The message is replaced by one of the same task and id whose request says only why it was refused. A child takes that as
it takes any request: where another request holds the id, or its job has ended, nothing changes; otherwise the job ends
as FAILURE, `invalid_request`.
"""

from __future__ import annotations

import base64
import json
import uuid
from typing import Any, NamedTuple

from tasks.contract.fork_request import REFUSED, text_of
from tasks.delivery.signatures import BadSignature, followers_of
from tasks.names import CAMPAIGN_TASK, FORK_TASK

#: Longest id under which a client is told anything, in characters; a fork's own may have fewer.
LONGEST_TOLD_ID = 4096
#: Longest path of a refused request that is repeated in its result, in characters.
_LONGEST_PATH = 4096
#: Longest body that is decoded only to find the id of a message of protocol 1, in characters.
_LONGEST_OLD_BODY = 1 << 20


class Body(NamedTuple):
    """A decoded body of protocol 2."""

    args: list[Any]
    kwargs: dict[str, Any]
    options: dict[str, Any]


class Refused(Exception):
    """The message is not taken; says why, without its contents. `body`: what it carries, as far as that is known."""

    def __init__(self, reason: str, body: Body | None = None) -> None:
        super().__init__(reason)
        self.body = body


def id_of(message: Any) -> str | None:
    """The id under which the message's client can be told something; None if there is none."""
    found = _task_and_id(message)
    return found[1] if found is not None else None


def ending(message: Any, refusal: Refused, queue: str) -> dict[str, Any] | None:
    """The message that ends the job of a refused one, to be taken in its place; None where none can be told."""
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
        | _place(message.get("headers")),
        "properties": {
            "correlation_id": job_id,
            "delivery_mode": 2,
            "body_encoding": "base64",
            "delivery_tag": str(uuid.uuid4()),
            "delivery_info": {"exchange": "", "routing_key": queue},
        },
    }


def _followers(options: dict[str, Any]) -> dict[str, Any]:
    try:
        return followers_of(options)
    except BadSignature:
        return {}


def _place(headers: Any) -> dict[str, Any]:
    """The message's place in a group, by which a chord counts it."""
    group, index = headers.get("group"), headers.get("group_index")
    if not isinstance(group, str):
        return {}
    return {"group": group} | ({"group_index": index} if type(index) is int else {})


def _task_and_id(message: Any) -> tuple[str, str] | None:
    """Of a task of the contract; also of protocol 1, which has both in its body."""
    headers = message.get("headers") if isinstance(message, dict) else None
    if not isinstance(headers, dict):
        return None
    found = headers if headers.get("task") is not None else old_body(message) or {}
    task, job_id = found.get("task"), found.get("id")
    if isinstance(job_id, uuid.UUID):  # kombu's JSON carries it
        job_id = str(job_id)
    if task not in (FORK_TASK, CAMPAIGN_TASK) or not isinstance(job_id, str) or not 0 < len(job_id) <= LONGEST_TOLD_ID:
        return None
    try:
        job_id.encode()
    except UnicodeEncodeError:  # a surrogate, which no key in Redis can have
        return None
    return task, job_id


def old_body(message: dict[str, Any]) -> dict[str, Any] | None:
    """The body of a message of protocol 1; None if it is none."""
    body, properties = message.get("body"), message.get("properties")
    if not isinstance(body, str) or len(body) > _LONGEST_OLD_BODY or not isinstance(properties, dict):
        return None
    try:
        decoded = json.loads(base64.b64decode(body) if properties.get("body_encoding") == "base64" else body)
    except (ValueError, RecursionError):
        return None
    return decoded if isinstance(decoded, dict) and "task" in decoded else None
