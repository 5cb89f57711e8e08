"""The fields of a ForkRequest and of every request, as pydantic models, which check plain data from a client."""

from __future__ import annotations

import os
import re
from typing import Annotated, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, InstanceOf, ValidationError, WithJsonSchema

from tasks.contract.raw_request import REFUSED, text_of
from tasks.copier.errors import Code, ForkError
from tasks.copier.options import (
    MOST_ITEMS,
    Cache,
    Durability,
    Options,
    Preserve,
    Reflink,
    Snapshot,
    SourceOpen,
    Verify,
)
from tasks.copier.roots import normal_path
from tasks.copier.source.selection import Selection

#: The most characters of one pattern or label.
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
    reflink: Reflink = Options.reflink
    snapshot: Snapshot = Options.snapshot
    skip: Annotated[list[RelativePath], Field(max_length=MOST_ITEMS)] = []
    exclude: Annotated[list[Pattern], Field(max_length=MOST_ITEMS)] = list(Options.exclude)
    preserve: Annotated[list[Preserve], Field(max_length=MOST_ITEMS)] = sorted(Options.preserve)
    durability: Durability = Options.durability
    verify: Verify = Options.verify
    max_copied_bytes: Annotated[int, Field(ge=0, lt=1 << 63)] | None = Options.max_copied_bytes
    source_open: SourceOpen = Options.source_open
    cache: Cache = Options.cache
    #: Returned unchanged in the result.
    labels: (
        Annotated[dict[Text, Text], Field(max_length=MOST_ITEMS)] | Annotated[list[Text], Field(max_length=MOST_ITEMS)]
    ) = {}

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
            cache=self.cache,
        )


class ForkRequest(AnyRequest):
    """A request for one fork, as decoded from JSON."""

    destination: DestinationPath


_DRY_RUN = "dry_run: a request is always made; send it to the task forkvm.estimate, or use `forkvm estimate`"

Request = TypeVar("Request", bound=AnyRequest)


def parse_as(model: type[Request], request: object) -> Request:
    """The request in plain data from a client, as an instance of `model`.

    Raises ForkError invalid_request, which names the field.
    """
    if not isinstance(request, dict):
        raise ForkError(Code.INVALID_REQUEST, "the message has no request; send one argument, `request`, an object", "")
    if isinstance(request.get(REFUSED), str):
        raise ForkError(Code.INVALID_REQUEST, request[REFUSED], text_of(request, "source"))
    if "dry_run" in request:
        raise ForkError(Code.INVALID_REQUEST, _DRY_RUN, text_of(request, "source"))
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


#: What a client is to read in place of pydantic's text, by the type of the error.
_TEXTS = {
    "extra_forbidden": "there is no such field; remove it",
    "missing": "the field is missing",
    "is_instance_of": "it must be a string",
}


def _explain(error: ValidationError) -> str:
    """All errors, one clause per field: `reflink: it must be 'auto', 'always' or 'never'`."""
    clauses = []
    for detail in error.errors(include_url=False, include_context=False, include_input=False):
        # pydantic names the alternatives of a type in brackets; they are not fields.
        where = ".".join(str(part) for part in detail["loc"] if "[" not in str(part)) or "request"
        text = detail["msg"].removeprefix("Value error, ").replace("Input should", "it must", 1)
        clauses.append(f"{where}: {_TEXTS.get(detail['type'], text)}")
    return "; ".join(clauses)
