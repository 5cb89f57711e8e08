"""Validation of messages before kombu and Celery see them.

Anyone who can write to Redis can queue anything. Some malformed messages end a Celery worker (invalid JSON, no body, a
list as id), and Celery logs messages that it refuses with their contents. So each message is validated first. A refused
message is logged with its id and the wrong field, without its contents. If its id is usable, the client gets the reason
as the result of its job (see `refused_messages`).
"""

from __future__ import annotations

import base64
import json
import logging
import time
import uuid
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import kombu.transport.redis
import kombu.utils.json
from celery import Celery
from pydantic import BaseModel, ConfigDict, Field, InstanceOf, StringConstraints, ValidationError

from tasks import events
from tasks.delivery.canvas import LONGEST_CANVAS
from tasks.delivery.signatures import FOLLOWERS, BadSignature, followers_of
from tasks.delivery.task_request import request_argument, seconds_since
from tasks.fork.waiting_forks import Accepted
from tasks.names import (
    ABANDON_TASK,
    BATCH_TASK,
    CHUNK_TASK,
    CLIENT_TASKS,
    FINISH_CAMPAIGN_TASK,
    FINISH_TASK,
    FORK_TASK,
    SWEEP_TASK,
)
from worker.runtime.compression import Undecodable, decompress
from worker.runtime.refused_messages import (
    LONGEST_RESULT_ID,
    Body,
    Refused,
    has_uuid,
    id_of,
    log_fields_of,
    old_body,
    replacement,
)
from worker.runtime.remote_control import is_well_formed

log = logging.getLogger(__name__)

#: Longest body that is decoded, in characters. The list of a million forks of a campaign takes half of it.
_LONGEST_BODY = 128 << 20
#: Longest interval between two sweeps, in seconds: Redis limits the TTLs that are computed from it.
_LONGEST_INTERVAL = 1_000_000_000
#: How far in the future `eta` and `expires` may be, in seconds.
_LONGEST_DELAY = 366 * 86400
#: How kombu's JSON writes values of types that JSON does not have.
_TYPED = {"__type__", "__value__"}
_KOMBU_TYPES = {"uuid", "datetime", "date", "time", "decimal", "bytes", "base64"}
#: Longest id of a client's message, in characters. Ids of chunks are longer.
_LONGEST_ID = 512

#: Text without surrogates, which a key in Redis cannot contain.
_Word = Annotated[str, StringConstraints(max_length=LONGEST_RESULT_ID + 64)]
_Moment = Annotated[str, Field(max_length=64)]
#: A JSON list of two numbers or nulls.
_Pair = Annotated[list[float | None], Field(min_length=2, max_length=2)]


class _Strict(BaseModel):
    """Values are not converted. Unknown fields are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())


class _Headers(_Strict):
    """The headers of Celery's message protocol 2 that are read here or by Celery, and our own."""

    task: _Word
    id: Annotated[_Word, Field(min_length=1)]
    root_id: _Word | None = None
    parent_id: _Word | None = None
    group: _Word | None = None
    eta: _Moment | None = None
    expires: _Moment | None = None
    retries: Annotated[int, Field(ge=0)] | None = None
    timelimit: _Pair | None = None
    ignore_result: bool | None = None
    origin: _Word | None = None
    stamped_headers: list[_Word] | None = None
    stamps: dict[str, Any] | None = None
    lang: _Moment | None = None
    group_index: int | None = None
    argsrepr: InstanceOf[str] | None = None
    kwargsrepr: InstanceOf[str] | None = None
    #: When the client sent the message, in seconds since the epoch; other values are ignored.
    sent_at: Any = None
    #: The client's trace (W3C Trace Context); other values are ignored.
    traceparent: Any = None
    #: Set by kombu in a message that was returned to its queue.
    redelivered: bool | None = None
    #: See `tasks.delivery.outcome.Holder`: the last heartbeat of a holder, and since when it has not changed.
    seen: _Pair | None = None
    #: See `tasks.delivery.backend.UUID_ID`.
    uuid_id: bool | None = None


class _Properties(_Strict):
    body_encoding: Literal["base64"] | None = None
    priority: Annotated[int, Field(ge=0, le=255)] | None = None
    correlation_id: _Word | None = None
    reply_to: _Word | None = None


class _Message(_Strict):
    body: Annotated[InstanceOf[str], Field(max_length=_LONGEST_BODY)]
    content_type: Annotated[Literal["application/json"], Field(alias="content-type")]
    content_encoding: Annotated[Literal["utf-8"], Field(alias="content-encoding")]
    headers: _Headers
    properties: _Properties


class _Arguments(BaseModel):
    """Values are not converted. Unknown fields are an error."""

    model_config = ConfigDict(strict=True, extra="forbid")


class _Chunk(_Arguments):
    fork_id: _Word
    destination: InstanceOf[str]
    number: Annotated[int, Field(ge=0)]


class _End(_Arguments):
    destination: InstanceOf[str]


class _Batch(_Arguments):
    campaign_id: _Word
    home: InstanceOf[str]
    first: Annotated[int, Field(ge=0)]


class _Conclude(_Arguments):
    home: InstanceOf[str]


class _Sweep(_Arguments):
    every: Annotated[int, Field(ge=2, le=_LONGEST_INTERVAL)]


#: The keyword arguments of the tasks that workers send to each other. The tasks of the contract check theirs.
_ARGUMENTS: dict[str, type[_Arguments]] = {
    CHUNK_TASK: _Chunk,
    FINISH_TASK: _End,
    ABANDON_TASK: _End,
    BATCH_TASK: _Batch,
    FINISH_CAMPAIGN_TASK: _Conclude,
    SWEEP_TASK: _Sweep,
}


def install_message_filter(app: Celery) -> None:
    """Make kombu in this process validate each message that it takes from a queue, with `checked`."""
    redis: Any = kombu.transport.redis
    decode, deliver = redis.loads, redis.Transport._deliver
    if hasattr(deliver, "is_filter"):
        return

    def loads(text: str) -> Any:
        try:
            return decode(text)
        except (ValueError, RecursionError):
            return None

    def deliver_checked(self: Any, message: Any, queue: str) -> None:
        if queue not in app.amqp.queues.consume_from:  # of Celery's remote control or events
            if is_well_formed(message):
                deliver(self, message, queue)
            else:
                log.warning("a message of remote control or events is ignored: it is not JSON of Celery's protocol")
            return
        taken: dict[str, Any] | None
        try:
            taken = checked(message, queue, app.tasks)
        except Refused as refusal:
            job_id = id_of(message)
            named = "" if job_id is None else f" (id {job_id[:_LONGEST_ID]!r}; its result has the reason)"
            fields = log_fields_of(message)
            log.warning("a message in the queue %s was refused: %s%s", queue, refusal, named, extra=fields)
            events.happened("rejection", refusal.kind)
            taken = replacement(message, refusal, queue)
        if taken is not None:
            deliver(self, taken, queue)

    vars(deliver_checked)["is_filter"] = True
    redis.loads, redis.Transport._deliver = loads, deliver_checked


def plain_fork(tasks: Any, has_traces: bool, text: bytes, queue: str) -> Accepted | None:
    """The request for a fork in a message that a pool process has taken from `queue` itself.

    None if the message is to go the ordinary way: it is refused, or has callbacks, or belongs to a client's trace and
    this worker `has_traces`. `tasks`: see `checked`.
    """
    try:
        message = json.loads(text)
        parsed, body = _parsed(message, tasks)
    except (Refused, ValueError, RecursionError):
        return None
    if parsed.headers.task != FORK_TASK or any(body.options.values()):
        return None
    if has_traces and parsed.headers.traceparent is not None:
        return None
    queued = seconds_since(parsed.headers.sent_at, None)
    return Accepted(parsed.headers.id, request_argument(tuple(body.args), body.kwargs), queued)


def checked(message: Any, queue: str, tasks: Any) -> dict[str, Any]:
    """The validated form of a message from `queue`. `tasks` are the registered tasks by name. Raises Refused.

    The delivery tag and the routing key are set here, so a sender cannot redirect retries into another queue, and no
    two messages have the same tag. Unknown headers are removed, because Celery turns each header into an attribute.
    """
    plain = _decompressed(message)
    _parsed(plain, tasks)
    properties = {
        **plain["properties"],
        "delivery_tag": str(uuid.uuid4()),
        "delivery_info": {"exchange": "", "routing_key": queue},
    }
    headers = {field: value for field, value in plain["headers"].items() if field in _Headers.model_fields}
    return {**plain, "headers": headers, "properties": properties}


def _parsed(message: Any, tasks: Any) -> tuple[_Message, Body]:
    """The parts of a message that is not compressed, and its body. Raises Refused."""
    if not isinstance(message, dict):
        raise Refused("it is not a JSON object")
    if has_uuid(message):
        raise Refused("its id is a UUID; send it as a string: task_id=str(...)")
    try:
        parsed = _Message.model_validate(message)
    except ValidationError as error:
        if isinstance(message.get("properties"), dict) and old_body(message):
            raise Refused("it uses Celery's message protocol 1; use protocol 2") from None
        raise Refused(_explain(error)) from None
    name = parsed.headers.task
    if name not in tasks or name.startswith("celery."):
        raise Refused(f"there is no task {name[:_LONGEST_ID]!r}", kind="unknown_task")
    body = _body(parsed)
    if name in CLIENT_TASKS:
        _check_job(parsed, body)
    else:
        _check_part(name, body)
    return parsed, body


def _check_job(message: _Message, body: Body) -> None:
    """Check a message of a client, except its request, which the task checks. Raises Refused."""
    if len(message.headers.id) > _LONGEST_ID:
        raise Refused(f"its id is longer than {_LONGEST_ID} characters", body)
    if "self" in body.kwargs:  # it would collide with the first parameter of Celery's functions
        raise Refused("the message must have one argument, `request`, an object", body, "arguments")
    for moment in (message.headers.eta, message.headers.expires):
        _check_moment(moment, body)
    try:
        followers = followers_of(body.options)
        if len(json.dumps(followers)) > LONGEST_CANVAS:
            raise Refused(f"options: longer than {LONGEST_CANVAS} characters", kind="options")
    except BadSignature as error:
        raise Refused(str(error), body, "options") from None


def _check_part(name: str, body: Body) -> None:
    """Check a message that a worker sends to others. Raises Refused."""
    if name in _ARGUMENTS:
        try:
            _ARGUMENTS[name].model_validate(body.kwargs)
        except ValidationError as error:
            raise Refused(f"{name}: {_explain(error)}", kind="arguments") from None
        if body.args:
            raise Refused(f"{name}: takes keyword arguments only", kind="arguments")
    if any(body.options.values()) or not set(body.options) <= set(FOLLOWERS):
        raise Refused(f"{name}: takes no options", kind="options")


def _check_moment(moment: str | None, body: Body) -> None:
    """Check `eta` or `expires`. Celery drops messages with an invalid time, and holds others in memory until then."""
    if moment is None:
        return
    try:
        when = datetime.fromisoformat(moment)
        when = when if when.tzinfo else when.replace(tzinfo=UTC)
        seconds = when.timestamp() - time.time()
        when.astimezone(UTC)
    except (ValueError, OverflowError, OSError):
        raise Refused("eta or expires is not an ISO 8601 time", body, "time") from None
    if seconds > _LONGEST_DELAY:
        raise Refused(f"eta or expires is more than {_LONGEST_DELAY // 86400} days away", body, "time")


def _decompressed(message: Any) -> Any:
    """The message with its body decompressed. Raises Refused."""
    headers = message.get("headers") if isinstance(message, dict) else None
    if not isinstance(headers, dict) or headers.get("compression") is None:
        return message
    method = headers["compression"]
    body, properties = message.get("body"), message.get("properties")
    is_base64 = isinstance(properties, dict) and properties.get("body_encoding") == "base64"
    if not isinstance(method, str) or not isinstance(body, str) or not is_base64 or len(body) > _LONGEST_BODY:
        raise Refused("compression: the body is not base64")
    try:
        text = decompress(base64.b64decode(body), method, _LONGEST_BODY)
    except (Undecodable, ValueError) as error:
        raise Refused(str(error)) from None
    headers = {field: value for field, value in headers.items() if field != "compression"}
    return {**message, "headers": headers, "body": base64.b64encode(text).decode("ascii")}


def _body(message: _Message) -> Body:
    """The body of a message of protocol 2: `[args, kwargs, embed]`. Raises Refused."""
    text: str | bytes = message.body
    typed: list[dict[str, Any]] = []

    def note_type(value: dict[str, Any]) -> dict[str, Any]:
        if value.keys() == _TYPED:
            typed.append(value)
        return value

    try:
        if message.properties.body_encoding is not None:
            text = base64.b64decode(text)
        decoded = json.loads(text, object_hook=note_type)
    except (ValueError, RecursionError):
        raise Refused("the body is not JSON") from None
    if not isinstance(decoded, list) or [type(part) for part in decoded] != [list, dict, dict]:
        raise Refused("the body is not a list of arguments, keyword arguments and options")
    body = Body(*decoded)
    if typed:
        _check_types(text, body)
    return body


def _check_types(text: str | bytes, body: Body) -> None:
    """Refuse values that kombu's JSON converts to other types, except in the client's callbacks. Raises Refused."""
    waiting: list[Any] = [body.args, body.kwargs]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if value.keys() == _TYPED:
                raise Refused(_not_json(value["__type__"]), body)
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
    try:
        kombu.utils.json.loads(text)
    except Exception:  # each type has its own exceptions
        raise Refused("options: kombu cannot decode a value", Body(body.args, body.kwargs, {})) from None


def _not_json(kind: object) -> str:
    word = kind if isinstance(kind, str) and kind in _KOMBU_TYPES else "special"
    return f"a {word} value is not a JSON type; send it as a string"


def _explain(error: ValidationError) -> str:
    """The invalid fields and the reasons, without their values."""
    details = error.errors(include_url=False, include_context=False, include_input=False)
    return "; ".join(f"{'.'.join(map(str, detail['loc']))[:99]}: {detail['msg']}" for detail in details[:3])
