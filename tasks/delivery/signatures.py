"""Which of the Celery signatures in a client's message a worker sends.

A client names the tasks that follow its job (`link`, `link_error`, a chain, a chord) as signatures in its message. The
worker sends them. So they must not go to the worker's own queues or keys, nor have an option that makes sending fail.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from tasks.names import CAMPAIGN_TASK, FORK_TASK

#: The deepest nesting of signatures, and the most signatures, in one message.
_DEEPEST = 30
_MOST = 10_000
#: The longest name of a task or queue, and the longest id, in characters.
_LONGEST = 255
#: The options of a message that contain signatures. celery.worker.request and celery.app.trace read no others.
FOLLOWERS = ("callbacks", "errbacks", "chain", "chord")
#: Tasks that only this program sends.
_OWN_TASK = re.compile(r"forkvm\.")
#: Queues that only this program sends to, and Redis keys of this program, of kombu and of Celery: the name of a queue
#: is the key of a Redis list.
_OWN_QUEUE = re.compile(r"forkvm(\..*)?#.*|(forkvm:|_kombu|celery-task|celery-taskset|unacked).*", re.DOTALL)
#: Options that route or encode a message in another way. A signature with one of them is refused.
_REFUSED = frozenset({"exchange", "exchange_type", "routing_key", "connection", "producer", "publisher", "router"})
_TEXTS = frozenset({"task_id", "group_id", "root_id", "parent_id", "reply_to", "queue", "shadow"})
_NUMBERS = frozenset({"countdown", "priority", "time_limit", "soft_time_limit", "group_index", "retries"})
#: Celery's names of the classes of signatures (canvas.Signature.TYPES).
_KINDS = frozenset({"chain", "group", "chord", "xmap", "xstarmap", "chunks"})


class BadSignature(ValueError):
    """A worker does not send this signature. The text quotes only names of tasks and queues."""


def followers_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """The signatures in the options of a message, each reduced to the options that a worker accepts.

    Empty if the message has none. Raises BadSignature.
    """
    if not set(options) <= set(FOLLOWERS):
        raise BadSignature(f"options: use only {', '.join(FOLLOWERS)}")
    cleaner = _Cleaner()
    found: dict[str, Any] = {}
    for name in FOLLOWERS:
        given = options.get(name)
        if given:
            found[name] = cleaner.signature(given, 0) if name == "chord" else cleaner.signatures(given, 0)
    return found


class _Cleaner:
    """Copies signatures, reduced to what a worker accepts, and counts them."""

    def __init__(self) -> None:
        self._count = 0

    def signatures(self, given: Any, depth: int) -> list[Any]:
        if not isinstance(given, list):
            raise BadSignature("options: give a list of signatures")
        return [self.signature(one, depth) for one in given]

    def signature(self, given: Any, depth: int) -> dict[str, Any]:
        self._count += 1
        if depth > _DEEPEST or self._count > _MOST:
            raise BadSignature(f"options: more than {_MOST} signatures, or nested more than {_DEEPEST} deep")
        if not isinstance(given, dict):
            raise BadSignature("options: a signature must be an object")
        name = _text(given.get("task"), "the name of a task")
        if _OWN_TASK.match(name) and name not in (FORK_TASK, CAMPAIGN_TASK):
            raise BadSignature(f"options: clients may not send the task {name!r}")
        kind = given.get("subtask_type")
        if kind is not None and kind not in _KINDS:
            raise BadSignature("options: subtask_type: unknown class of signatures")
        args, kwargs, options = given.get("args") or [], given.get("kwargs") or {}, given.get("options") or {}
        if not (isinstance(args, list) and isinstance(kwargs, dict) and isinstance(options, dict)):
            raise BadSignature(f"options: {name}: args must be a list, kwargs and options must be objects")
        return {
            "task": name,
            "args": args,
            "kwargs": self._kwargs(kind, kwargs, depth),
            "options": self._options(name, options, depth),
            "subtask_type": kind,
            "immutable": bool(given.get("immutable")),
            **({"chord_size": given["chord_size"]} if isinstance(given.get("chord_size"), int) else {}),
        }

    def _kwargs(self, kind: str | None, kwargs: dict[str, Any], depth: int) -> dict[str, Any]:
        """The keyword arguments. Those of a chain, group or chord contain the signatures that it consists of."""
        if kind in ("chain", "group"):
            return kwargs | {"tasks": self.signatures(kwargs.get("tasks"), depth + 1)}
        if kind == "chord":
            header, body = kwargs.get("header"), kwargs.get("body")
            parts = self.signatures if isinstance(header, list) else self.signature
            return kwargs | {"header": parts(header, depth + 1), "body": self.signature(body, depth + 1)}
        return kwargs | {"task": self.signature(kwargs.get("task"), depth + 1)} if kind is not None else kwargs

    def _options(self, task: str, options: dict[str, Any], depth: int) -> dict[str, Any]:
        stamps = options.get("stamped_headers")
        names = {name for name in stamps if isinstance(name, str)} if isinstance(stamps, list) else set()
        kept: dict[str, Any] = {}
        for name, value in options.items():
            if value is None:
                continue
            if name in _REFUSED or (name == "serializer" and value != "json"):
                raise BadSignature(f"options: {task}: {name} is not allowed; use queue")
            if name in ("link", "link_error"):
                several = value if isinstance(value, list) else [value]
                kept[name] = self.signatures(several, depth + 1)
            elif name == "chain":
                kept[name] = self.signatures(value, depth + 1)
            elif name == "chord":
                kept[name] = self.signature(value, depth + 1)
            elif name in ("eta", "expires"):
                kept[name] = _moment(value, f"{task}: {name}")
            elif name in _TEXTS:
                kept[name] = _text(value, f"{task}: {name}")
            elif _is_plain(name, value) or name in names:
                kept[name] = value
        if _OWN_QUEUE.fullmatch(kept.get("queue", "")):
            raise BadSignature(f"options: {task}: clients may not send to the queue {kept['queue']!r}")
        return kept | ({"stamped_headers": sorted(names)} if names else {})


def _is_plain(name: str, value: Any) -> bool:
    """Whether a worker copies this option unchanged. Other options are left out."""
    if name in _NUMBERS:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return (name == "ignore_result" and isinstance(value, bool)) or (name == "headers" and isinstance(value, dict))


def _moment(value: Any, what: str) -> Any:
    """A time as text, as seconds, or in the form of kombu's JSON, decoded or not."""
    is_typed = isinstance(value, dict) and value.get("__type__") == "datetime"
    if not is_typed and not isinstance(value, str | int | float | datetime):
        raise BadSignature(f"options: {what}: give a time")
    return value


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= _LONGEST:
        raise BadSignature(f"options: {what}: give a text of 1 to {_LONGEST} characters")
    return value
