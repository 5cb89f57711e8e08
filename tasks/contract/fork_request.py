"""The contract with schedulers: what a request may say. Results are in `tasks.copier.fork_spec` and `report`."""

from __future__ import annotations

import os
import re
import time
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, InstanceOf, ValidationError

from tasks.copier.errors import Code, ForkError
from tasks.copier.fork_spec import Clock, ForkResult, ForkSpec, failed
from tasks.copier.options import DEFAULT_EXCLUDE, PRESERVE_ALL, Durability, Options, Preserve, Reflink, Snapshot, Verify
from tasks.copier.report import Totals
from tasks.copier.roots import normal_path
from tasks.copier.source.selection import Selection

#: Most entries of a list or mapping in a request, and characters of one pattern or label.
_MOST = 10_000
_LONGEST = 4096


def _short(text: str) -> str:
    if len(text) > _LONGEST:
        raise ValueError(f"longer than {_LONGEST} characters")
    return text


def _name(text: str) -> str:
    """What is matched against file names: no NUL, and no surrogate that stands for no byte."""
    try:
        encoded = os.fsencode(text)
    except UnicodeEncodeError:
        raise ValueError("a surrogate in it stands for no byte") from None
    if b"\0" in encoded:
        raise ValueError("a file name cannot hold a NUL character")
    return text


def _relative(path: str) -> str:
    parts = path.split("/")
    if path.startswith("/") or ".." in parts:
        raise ValueError("a path relative to the source, without '..', is wanted")
    return "/".join(part for part in parts if part not in ("", "."))


#: A Python string as it is. pydantic's own `str` refuses the lone surrogates that stand for bytes that are not UTF-8.
Text = Annotated[InstanceOf[str], AfterValidator(_short)]
Pattern = Annotated[Text, AfterValidator(_name)]
RelativePath = Annotated[Pattern, AfterValidator(_relative)]


#: Absolute paths. Bytes that are not UTF-8 are written as Python's surrogateescape does (`\udcff` for 0xff).
SourcePath = Annotated[InstanceOf[str], AfterValidator(lambda path: normal_path(path, "source"))]
DestinationPath = Annotated[InstanceOf[str], AfterValidator(lambda path: normal_path(path, "destination"))]


class AnyRequest(BaseModel):
    """What every request says: the source, and how it is to be cloned. An unknown field is an error."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    source: SourcePath
    reflink: Reflink = "auto"
    snapshot: Snapshot = "auto"
    skip: Annotated[list[RelativePath], Field(max_length=_MOST)] = []
    exclude: Annotated[list[Pattern], Field(max_length=_MOST)] = list(DEFAULT_EXCLUDE)
    preserve: Annotated[list[Preserve], Field(max_length=_MOST)] = sorted(PRESERVE_ALL)
    durability: Durability = "none"
    verify: Verify = "none"
    #: Echoed back in the result as they came.
    labels: Annotated[dict[Text, Text] | list[Text], Field(max_length=_MOST)] = {}

    def options(self) -> Options:
        """What the engine is told."""
        return Options(
            reflink=self.reflink,
            snapshot=self.snapshot,
            skip=tuple(self.skip),
            exclude=tuple(self.exclude),
            preserve=frozenset(self.preserve),
            durability=self.durability,
            verify=self.verify,
        )


class ForkRequest(AnyRequest):
    """A request for one fork, as JSON carries it."""

    destination: DestinationPath


Request = TypeVar("Request", bound=AnyRequest)


def parse(request: object) -> ForkRequest:
    """The fork that plain data from a client asks for. Raises ForkError invalid_request, which names the field."""
    return parse_as(ForkRequest, request)


#: The field of what the worker makes of a message that it refused: why. See `worker.runtime.refused_messages`.
REFUSED = "refused"


def parse_as(model: type[Request], request: object) -> Request:
    """The request of the given kind that plain data from a client stands for.

    Raises ForkError invalid_request, which names the field.
    """
    if not isinstance(request, dict):
        raise ForkError(Code.INVALID_REQUEST, "the message carries no request: one argument, `request`, an object", "")
    if isinstance(request.get(REFUSED), str):
        raise ForkError(Code.INVALID_REQUEST, request[REFUSED], text_of(request, "source"))
    try:
        parsed = model.model_validate(request)
    except ValidationError as error:
        raise ForkError(Code.INVALID_REQUEST, _explain(error), text_of(request, "source")) from None
    try:
        Selection(parsed.skip, parsed.exclude)
    except re.error as error:
        message = f"exclude: {error.pattern!r} is no pattern: {error.msg}"
        raise ForkError(Code.INVALID_REQUEST, message, parsed.source) from None
    return parsed


def spec_of(request: object, fork_id: str, *, owner: Literal["queue", "local"], queued: float = 0.0) -> ForkSpec:
    """The fork that plain data asks for; `queued` is how long it waited, in seconds. Raises ForkError."""
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
    """The result of what could not be made a fork of."""
    spec = ForkSpec(fork_id=fork_id, source=text_of(request, "source"), destination=text_of(request, "destination"))
    return failed(spec, error, Totals(), 0, Clock(spec.started))


def text_of(request: object, field: str) -> str:
    """The text in a field of what may be no request at all, for messages and failed results."""
    value: Any = request.get(field) if isinstance(request, dict) else None
    return value if isinstance(value, str) else ""


def _explain(error: ValidationError) -> str:
    """All that is wrong, one clause a field: `reflink: Input should be 'auto', 'always' or 'never'`."""
    clauses = []
    for detail in error.errors(include_url=False, include_context=False, include_input=False):
        where = ".".join(str(part) for part in detail["loc"]) or "request"
        clauses.append(f"{where}: {detail['msg']}")
    return "; ".join(clauses)
