"""What a worker takes from its queues: messages of tasks, whole and of the types that Celery and the tasks expect.

Anyone who reaches Redis can put anything there. kombu and Celery look at a message in many places, and what they do not
expect in some of them ends the worker (no JSON, no body, a list for an id); what they refuse, they log with its whole
contents. So each message is checked once, before either sees it. A refused one is logged with its id and the part that
is wrong, without its contents; where the id is usable, its client gets the reason as the job's result (see
`refused_messages`).
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

from tasks.delivery.canvas import LONGEST_CANVAS
from tasks.delivery.signatures import FOLLOWERS, BadSignature, followers_of
from tasks.names import (
    ABANDON_TASK,
    BATCH_TASK,
    CAMPAIGN_TASK,
    CHUNK_TASK,
    FINISH_CAMPAIGN_TASK,
    FINISH_TASK,
    FORK_TASK,
    SWEEP_TASK,
)
from worker.runtime.compression import Undecodable, decompress
from worker.runtime.refused_messages import LONGEST_TOLD_ID, Body, Refused, ending, id_of, old_body

log = logging.getLogger(__name__)

#: Longest body that is decoded, in characters: the list of a campaign of a million forks takes half of it.
_LONGEST_BODY = 128 << 20
#: Longest time between two sweeps, in seconds; Redis takes no TTL without a bound.
_LONGEST_INTERVAL = 1_000_000_000
#: Farthest time to come of a message, in seconds.
_FARTHEST = 366 * 86400
#: How kombu's JSON writes what JSON has no type for.
_TYPED = {"__type__", "__value__"}
_KOMBU_TYPES = {"uuid", "datetime", "date", "time", "decimal", "bytes", "base64"}
#: Longest id that a client may give, in characters; those of a fork's chunks are longer.
_LONGEST_ID = 512

#: Without the surrogates that a key in Redis cannot have.
_Word = Annotated[str, StringConstraints(max_length=LONGEST_TOLD_ID + 64)]
_Moment = Annotated[str, Field(max_length=64)]
#: Two numbers or nulls, as JSON has them.
_Pair = Annotated[list[float | None], Field(min_length=2, max_length=2)]


class _Strict(BaseModel):
    """Types as they are; what else a client adds is not read."""

    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())


class _Headers(_Strict):
    """Celery's message protocol 2, as far as anything here reads it, and our own."""

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
    #: When the client sent it, in seconds since the epoch; anything else is passed over.
    sent_at: Any = None
    #: kombu's, where a worker gave it back.
    redelivered: bool | None = None
    #: See `tasks.delivery.outcome.Holder`: the last heartbeat of a holder, and since when it has not changed.
    seen: _Pair | None = None


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
    """Types as they are, and nothing else."""

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


#: Of Celery's own tasks the one that does nothing, by which a worker's pace is measured. Others could call any task.
EMPTY_TASK = "celery.accumulate"
#: The arguments of the tasks that this program sends itself; all by name. Those of the contract tell their client what
#: is wrong.
_ARGUMENTS: dict[str, type[_Arguments]] = {
    CHUNK_TASK: _Chunk,
    FINISH_TASK: _End,
    ABANDON_TASK: _End,
    BATCH_TASK: _Batch,
    FINISH_CAMPAIGN_TASK: _Conclude,
    SWEEP_TASK: _Sweep,
}


def install_message_filter(app: Celery) -> None:
    """Have this process take no message but such as `checked` lets through."""
    redis: Any = kombu.transport.redis
    decode, deliver = redis.loads, redis.Transport._deliver
    if hasattr(deliver, "is_gate"):
        return

    def loads(text: str) -> Any:
        try:
            return decode(text)
        except (ValueError, RecursionError):
            return None

    def gate(self: Any, message: Any, queue: str) -> None:
        is_ours = queue in app.amqp.queues.consume_from  # the others are Celery's own: events, remote control
        taken = message
        if is_ours or message is None:
            try:
                taken = checked(message, queue, app.tasks)
            except Refused as refusal:
                job_id = id_of(message)
                named = "" if job_id is None else f" (id {job_id[:_LONGEST_ID]!r}; its client is told so)"
                log.warning("a message in the queue %s was refused: %s%s", queue, refusal, named)
                taken = ending(message, refusal, queue)
        if taken is not None:
            deliver(self, taken, queue)

    vars(gate)["is_gate"] = True
    redis.loads, redis.Transport._deliver = loads, gate


def checked(message: Any, queue: str, tasks: Any) -> dict[str, Any]:
    """The message as it is to be taken from `queue`; `tasks` are those that there are, by name. Raises Refused.

    How it came is said by the worker that took it, not by its sender: so no sender leads the answers into another
    queue, and two messages never have one tag. Headers that nobody here reads are left out: Celery makes attributes of
    them all.
    """
    plain = _decompressed(message)
    try:
        parsed = _Message.model_validate(plain)
    except ValidationError as error:
        if isinstance(message, dict) and isinstance(message.get("properties"), dict) and old_body(message):
            raise Refused("it has Celery's message protocol 1; this worker takes protocol 2") from None
        raise Refused(_explain(error)) from None
    name = parsed.headers.task
    if name not in tasks or (name.startswith("celery.") and name != EMPTY_TASK):
        raise Refused(f"there is no task {name[:_LONGEST_ID]!r}")
    body = _body(parsed)
    if name in (FORK_TASK, CAMPAIGN_TASK):
        _check_job(parsed, body)
    else:
        _check_part(name, body)
    properties = {
        **plain["properties"],
        "delivery_tag": str(uuid.uuid4()),
        "delivery_info": {"exchange": "", "routing_key": queue},
    }
    headers = {field: value for field, value in plain["headers"].items() if field in _Headers.model_fields}
    return {**plain, "headers": headers, "properties": properties}


def _check_job(message: _Message, body: Body) -> None:
    """A message of a client; the task itself says what is wrong with its request. Raises Refused."""
    if len(message.headers.id) > _LONGEST_ID:
        raise Refused(f"its id is longer than {_LONGEST_ID} characters", body)
    if "self" in body.kwargs:  # no function of Celery's takes that
        raise Refused("the message carries no request: one argument, `request`, an object", body)
    for moment in (message.headers.eta, message.headers.expires):
        _check_moment(moment, body)
    try:
        followers = followers_of(body.options)
        if len(json.dumps(followers)) > LONGEST_CANVAS:
            raise Refused(f"options: longer than {LONGEST_CANVAS} characters")
    except BadSignature as error:
        raise Refused(str(error), body) from None


def _check_part(name: str, body: Body) -> None:
    """A message of this program, or the empty task. Raises Refused."""
    if name in _ARGUMENTS:
        try:
            _ARGUMENTS[name].model_validate(body.kwargs)
        except ValidationError as error:
            raise Refused(f"{name}: {_explain(error)}") from None
        if body.args:
            raise Refused(f"{name}: its arguments have names")
    if any(body.options.values()) or not set(body.options) <= set(FOLLOWERS):
        raise Refused(f"{name}: it has options")


def _check_moment(moment: str | None, body: Body) -> None:
    """Celery drops a message whose time it cannot compute with, and keeps one in memory until its time has come."""
    if moment is None:
        return
    try:
        when = datetime.fromisoformat(moment)
        seconds = (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp() - time.time()
        when.astimezone(UTC)
    except (ValueError, OverflowError, OSError):
        raise Refused("eta or expires is no time of ISO 8601", body) from None
    if seconds > _FARTHEST:
        raise Refused(f"eta or expires is more than {_FARTHEST // 86400} days away", body)


def _decompressed(message: Any) -> Any:
    """The message as it would be without its client's `task_compression`."""
    headers = message.get("headers") if isinstance(message, dict) else None
    if not isinstance(headers, dict) or headers.get("compression") is None:
        return message
    method = headers["compression"]
    body, properties = message.get("body"), message.get("properties")
    is_base64 = isinstance(properties, dict) and properties.get("body_encoding") == "base64"
    if not isinstance(method, str) or not isinstance(body, str) or not is_base64 or len(body) > _LONGEST_BODY:
        raise Refused("compression: the body is not in base64")
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

    def poll(value: dict[str, Any]) -> dict[str, Any]:
        if value.keys() == _TYPED:
            typed.append(value)
        return value

    try:
        if message.properties.body_encoding is not None:
            text = base64.b64decode(text)
        decoded = json.loads(text, object_hook=poll)
    except (ValueError, RecursionError):
        raise Refused("the body is no JSON") from None
    if not isinstance(decoded, list) or [type(part) for part in decoded] != [list, dict, dict]:
        raise Refused("the body is not [arguments, arguments by name, options]")
    body = Body(*decoded)
    if typed:
        _check_types(text, body)
    return body


def _check_types(text: str | bytes, body: Body) -> None:
    """Refuse what kombu's JSON makes other objects of, but in what is passed on to the client's own tasks."""
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
    except Exception:  # each type has errors of its own
        raise Refused("options: a value that kombu cannot decode", Body(body.args, body.kwargs, {})) from None


def _not_json(kind: object) -> str:
    word = kind if isinstance(kind, str) and kind in _KOMBU_TYPES else "special"
    return f"a {word} value: only what JSON has itself is taken; write it as text"


def _explain(error: ValidationError) -> str:
    """The parts that are wrong, and how, without what they hold."""
    details = error.errors(include_url=False, include_context=False, include_input=False)
    return "; ".join(f"{'.'.join(map(str, detail['loc']))[:99]}: {detail['msg']}" for detail in details[:3])
