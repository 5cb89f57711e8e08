"""The contract with schedulers: the fields of a ForkRequest, and how it becomes a ForkSpec.

The results are defined in `tasks.copier.fork_spec` and `tasks.copier.report`.
"""

from __future__ import annotations

import os
import re
import time
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, InstanceOf, ValidationError, WithJsonSchema

from tasks.copier.errors import Code, ForkError
from tasks.copier.fork_spec import Clock, ForkResult, ForkSpec, failed
from tasks.copier.options import (
    DEFAULT_EXCLUDE,
    PRESERVE_ALL,
    Durability,
    Options,
    Preserve,
    Reflink,
    Snapshot,
    SourceOpen,
    Verify,
)
from tasks.copier.report import Totals
from tasks.copier.roots import normal_path
from tasks.copier.source.selection import Selection

#: The most entries of a list or mapping in a request, and the most characters of one pattern or label.
_MOST = 10_000
_LONGEST = 4096


def _short(text: str) -> str:
    if len(text) > _LONGEST:
        raise ValueError(f"the text has {len(text)} characters; at most {_LONGEST} are allowed")
    return text


def _name(text: str) -> str:
    """Refuse text that no file name can contain."""
    try:
        encoded = os.fsencode(text)
    except UnicodeEncodeError:
        raise ValueError("it contains a surrogate character that cannot be encoded; remove it") from None
    if b"\0" in encoded:
        raise ValueError("it contains a NUL character, which no file name can contain; remove it")
    return text


def _relative(path: str) -> str:
    parts = path.split("/")
    if path.startswith("/") or ".." in parts:
        raise ValueError("give a path relative to the source, without '..'")
    return "/".join(part for part in parts if part not in ("", "."))


#: Any Python string. pydantic's own `str` refuses lone surrogates, which represent bytes that are not UTF-8.
Text = Annotated[InstanceOf[str], AfterValidator(_short), WithJsonSchema({"type": "string", "maxLength": _LONGEST})]
Pattern = Annotated[Text, AfterValidator(_name)]
RelativePath = Annotated[Pattern, AfterValidator(_relative)]


#: Absolute paths. Bytes that are not UTF-8 are encoded with Python's surrogateescape (`\udcff` for 0xff).
_ABSOLUTE = WithJsonSchema({"type": "string", "pattern": "^/", "description": "An absolute path."})
SourcePath = Annotated[InstanceOf[str], AfterValidator(lambda path: normal_path(path, "source")), _ABSOLUTE]
DestinationPath = Annotated[InstanceOf[str], AfterValidator(lambda path: normal_path(path, "destination")), _ABSOLUTE]


class AnyRequest(BaseModel):
    """The fields of every request: the source, and how to clone it. An unknown field is an error."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    source: SourcePath
    reflink: Reflink = "auto"
    snapshot: Snapshot = "auto"
    skip: Annotated[list[RelativePath], Field(max_length=_MOST)] = []
    exclude: Annotated[list[Pattern], Field(max_length=_MOST)] = list(DEFAULT_EXCLUDE)
    preserve: Annotated[list[Preserve], Field(max_length=_MOST)] = sorted(PRESERVE_ALL)
    durability: Durability = "none"
    verify: Verify = "none"
    max_copied_bytes: Annotated[int, Field(ge=0, lt=1 << 63)] | None = None
    source_open: SourceOpen = "allow"
    #: Returned unchanged in the result.
    labels: Annotated[dict[Text, Text], Field(max_length=_MOST)] | Annotated[list[Text], Field(max_length=_MOST)] = {}

    def options(self) -> Options:
        """The options of the engine that the request asks for."""
        return Options(
            reflink=self.reflink,
            snapshot=self.snapshot,
            skip=tuple(self.skip),
            exclude=tuple(self.exclude),
            preserve=frozenset(self.preserve),
            durability=self.durability,
            verify=self.verify,
            max_copied_bytes=self.max_copied_bytes,
            source_open=self.source_open,
        )


class ForkRequest(AnyRequest):
    """A request for one fork, as decoded from JSON."""

    destination: DestinationPath


Request = TypeVar("Request", bound=AnyRequest)


def parse(request: object) -> ForkRequest:
    """The ForkRequest in plain data from a client. Raises ForkError invalid_request, which names the field."""
    return parse_as(ForkRequest, request)


#: A worker that refuses a message replaces its request by one with this field, which holds the reason; see
#: `worker.runtime.refused_messages`.
REFUSED = "refused"


def parse_as(model: type[Request], request: object) -> Request:
    """The request in plain data from a client, as an instance of `model`.

    Raises ForkError invalid_request, which names the field.
    """
    if not isinstance(request, dict):
        raise ForkError(Code.INVALID_REQUEST, "the message has no request; send one argument, `request`, an object", "")
    if isinstance(request.get(REFUSED), str):
        raise ForkError(Code.INVALID_REQUEST, request[REFUSED], text_of(request, "source"))
    try:
        parsed = model.model_validate(request)
    except ValidationError as error:
        raise ForkError(Code.INVALID_REQUEST, _explain(error), text_of(request, "source")) from None
    try:
        Selection(parsed.skip, parsed.exclude)
    except re.error as error:
        message = f"exclude: {error.pattern!r} is not a valid pattern: {error.msg}"
        raise ForkError(Code.INVALID_REQUEST, message, parsed.source) from None
    return parsed


def spec_of(request: object, fork_id: str, *, owner: Literal["queue", "local"], queued: float = 0.0) -> ForkSpec:
    """The fork that a request asks for. `queued` is how long it waited, in seconds. Raises ForkError."""
    started = time.time()
    parsed = parse(request)
    return ForkSpec(
        fork_id=fork_id,
        source=parsed.source,
        destination=parsed.destination,
        options=parsed.options(),
        labels=parsed.labels,
        owner=owner,
        queued=queued,
        started=started,
    )


def refused(request: object, fork_id: str, error: ForkError) -> ForkResult:
    """The result of a request that is not a valid ForkRequest."""
    spec = ForkSpec(fork_id=fork_id, source=text_of(request, "source"), destination=text_of(request, "destination"))
    return failed(spec, error, Totals(), 0, Clock(spec.started))


def text_of(request: object, field: str) -> str:
    """The text in a field of a request that may be invalid, for messages and failed results; empty if there is none."""
    value: Any = request.get(field) if isinstance(request, dict) else None
    return value if isinstance(value, str) else ""


def _explain(error: ValidationError) -> str:
    """All errors, one clause per field: `reflink: Input should be 'auto', 'always' or 'never'`."""
    clauses = []
    for detail in error.errors(include_url=False, include_context=False, include_input=False):
        where = ".".join(str(part) for part in detail["loc"]) or "request"
        clauses.append(f"{where}: {detail['msg']}")
    return "; ".join(clauses)
