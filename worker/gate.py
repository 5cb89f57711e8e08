"""What a worker takes from its queues: messages of tasks, whole and of the types that Celery and the tasks expect.

Anyone who reaches Redis can put anything there. kombu and Celery look at a message in many places, and what they do not
expect in some of them ends the worker (no JSON, no body, a list for an id); what they refuse, they log with its whole
contents. So each message is looked at once, before either sees it, and refused with one line that tells nothing of it
but which part is wrong.
"""

from __future__ import annotations

import base64
import json
import logging
import uuid
from datetime import datetime
from typing import Annotated, Any, Literal

import kombu.transport.redis
from celery import Celery
from pydantic import BaseModel, ConfigDict, Field, InstanceOf, StringConstraints, ValidationError

from tasks.context import BATCH_TASK, BURY_TASK, CHUNK_TASK, CONCLUDE_TASK, FINISH_TASK, SWEEP_TASK

log = logging.getLogger(__name__)

#: Longest body that is decoded, in characters: the list of a campaign of a million forks takes half of it.
_LONGEST_BODY = 128 << 20
#: Longest time between two sweeps, in seconds; Redis takes no TTL without a bound.
_LONGEST_INTERVAL = 1_000_000_000
#: Longest id that a client may give, in characters; those of a fork's chunks are longer.
_LONGEST_ID = 512

#: Without the surrogates that a key in Redis cannot have.
_Word = Annotated[str, StringConstraints(max_length=_LONGEST_ID + 64)]
_Moment = Annotated[str, Field(max_length=64)]
#: Two numbers or nulls, as JSON has them.
_Pair = Annotated[list[float | None], Field(min_length=2, max_length=2)]


class _Strict(BaseModel):
    """Types as they are; whatever else a client adds is its own affair."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())


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
    #: A few bytes could be gigabytes.
    compression: None = None
    #: See `tasks.app`: the pulse that was seen of a holder, and since when.
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
    BURY_TASK: _End,
    BATCH_TASK: _Batch,
    CONCLUDE_TASK: _Conclude,
    SWEEP_TASK: _Sweep,
}


class Refused(Exception):
    """The message is not taken; says why, without its contents."""


def watch_the_gate(app: Celery) -> None:
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
        try:
            taken = checked(message, queue, app.tasks) if is_ours or message is None else message
        except Refused as refusal:
            log.warning("a message in the queue %s was refused: %s", queue, refusal)
            return
        deliver(self, taken, queue)

    vars(gate)["is_gate"] = True
    redis.loads, redis.Transport._deliver = loads, gate


def checked(message: Any, queue: str, tasks: Any) -> dict[str, Any]:
    """The message as it is to be taken from `queue`; `tasks` are those that there are, by name. Raises Refused.

    How it came is told by who took it, not by who sent it: so no sender leads the answers into another queue, and two
    messages never have one tag.
    """
    try:
        parsed = _Message.model_validate(message)
        _check_moments(parsed.headers)
    except ValidationError as error:
        raise Refused(_explain(error)) from None
    name = parsed.headers.task
    if name not in tasks or (name.startswith("celery.") and name != EMPTY_TASK):
        raise Refused(f"there is no task {name[:_LONGEST_ID]!r}")
    if name not in _ARGUMENTS and len(parsed.headers.id) > _LONGEST_ID:
        raise Refused(f"its id is longer than {_LONGEST_ID} characters")
    args, kwargs = _arguments(parsed)
    if name in _ARGUMENTS:
        try:
            _ARGUMENTS[name].model_validate(kwargs)
        except ValidationError as error:
            raise Refused(f"{name}: {_explain(error)}") from None
        if args:
            raise Refused(f"{name}: its arguments have names")
    properties = {
        **message["properties"],
        "delivery_tag": str(uuid.uuid4()),
        "delivery_info": {"exchange": "", "routing_key": queue},
    }
    taken = {**message, "properties": properties}
    if "self" in kwargs:  # no function of Celery's takes that; without arguments the fork tells its client
        return taken | {"body": _encode([[], {}, {}], parsed.properties.body_encoding)}
    return taken


def _arguments(message: _Message) -> tuple[list[Any], dict[str, Any]]:
    """The arguments in a body of protocol 2: `[args, kwargs, embed]`."""
    body: str | bytes = message.body
    try:
        if message.properties.body_encoding is not None:
            body = base64.b64decode(body)
        decoded = json.loads(body)
    except (ValueError, RecursionError):
        raise Refused("the body is no JSON") from None
    if not isinstance(decoded, list) or [type(part) for part in decoded] != [list, dict, dict]:
        raise Refused("the body is not [arguments, arguments by name, options]")
    args, kwargs, _ = decoded
    return args, kwargs


def _encode(body: list[Any], encoding: str | None) -> str:
    text = json.dumps(body)
    return text if encoding is None else base64.b64encode(text.encode()).decode("ascii")


def _check_moments(headers: _Headers) -> None:
    for moment in (headers.eta, headers.expires):
        if moment is not None:
            try:
                datetime.fromisoformat(moment)
            except ValueError:
                raise Refused("eta or expires is no time of ISO 8601") from None


def _explain(error: ValidationError) -> str:
    """The parts that are wrong, and how, without what they hold."""
    details = error.errors(include_url=False, include_context=False, include_input=False)
    return "; ".join(f"{'.'.join(map(str, detail['loc']))[:99]}: {detail['msg']}" for detail in details[:3])
