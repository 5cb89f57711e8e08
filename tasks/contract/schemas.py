"""The JSON Schemas of requests, results and progress, generated from the classes that the program itself uses.

docs/schemas/ has them as files; its README says how they may change.
"""

from __future__ import annotations

from functools import reduce
from importlib import import_module
from operator import or_
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints, is_typeddict

Schema = dict[str, Any]

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
#: The version of the contract. It changes with the program's major version only.
_VERSION = 1

#: The class of each document, with its module, which is imported when the schema is made; and a description.
_MODELS = {
    "fork-request": ("tasks.contract.request_model", "ForkRequest", "The argument `request` of the task forkvm.fork."),
    "fork-result": (
        "tasks.copier.fork_spec",
        "ForkResult",
        "The result of the task forkvm.fork, and of each fork of a campaign.",
    ),
    "fork-progress": ("tasks.copier.progress", "Progress", "The progress of a fork in the state PROGRESS."),
    "estimate": (
        "tasks.copier.estimate.estimate",
        "Estimate",
        "The result of the task forkvm.estimate.",
    ),
    "file-result": ("tasks.copier.report", "FileResult", "What was done with one entry of a fork's source."),
    "campaign-request": (
        "tasks.contract.campaign_request",
        "CampaignRequest",
        "The argument `request` of the task forkvm.campaign.",
    ),
    "campaign-result": ("tasks.copier.campaign.spec", "CampaignResult", "The result of the task forkvm.campaign."),
    "campaign-progress": (
        "tasks.copier.campaign.spec",
        "CampaignProgress",
        "The progress of a campaign in the state PROGRESS.",
    ),
}
NAMES = tuple(_MODELS)


def schema(name: str) -> Schema:
    """The JSON Schema of one of `NAMES`."""
    from pydantic import TypeAdapter

    module, model, description = _MODELS[name]
    found = TypeAdapter(_for_pydantic(getattr(import_module(module), model))).json_schema()
    for part in (found, *found.get("$defs", {}).values()):
        _remove_titles(part)
    _name_the_codes(found)
    if name in ("fork-result", "campaign-result"):
        _name_the_counts(found["properties"], _example(name))
    head = {"$schema": _DIALECT, "$id": f"urn:forkvm:{name}:{_VERSION}", "description": description}
    return head | found


def _for_pydantic(kind: Any) -> Any:
    """A type with each TypedDict in it as one of typing_extensions: before Python 3.12 pydantic accepts no other."""
    import typing_extensions

    if is_typeddict(kind):
        make: Any = typing_extensions.TypedDict
        return make(kind.__name__, {field: _for_pydantic(hint) for field, hint in get_type_hints(kind).items()})
    arguments, origin = get_args(kind), get_origin(kind)
    if not arguments or origin is Literal:
        return kind
    converted = [_for_pydantic(argument) for argument in arguments]
    return reduce(or_, converted) if isinstance(kind, UnionType) else origin[tuple(converted)]


def _remove_titles(found: Schema) -> None:
    """Remove what pydantic writes for readers of the source: the docstring, and each field's name again as a title."""
    found.pop("description", None)
    for value in found["properties"].values():
        value.pop("title", None)


def _name_the_codes(found: Schema) -> None:
    """List the error codes. An error is read from JSON, so its class has them as text."""
    from tasks.copier.errors import Code

    record = found.get("$defs", {}).get("ErrorRecord")
    if record is not None:
        record["properties"]["code"]["enum"] = [str(code) for code in Code]


def _name_the_counts(properties: Schema, example: dict[str, Any]) -> None:
    """List the keys of each object of numbers (`files`, `bytes`, `seconds`), as the engine makes them."""
    for field, value in properties.items():
        numbers = value.get("additionalProperties")
        if isinstance(numbers, dict) and field != "labels":
            names = list(example[field])
            properties[field] = {"type": "object", "properties": dict.fromkeys(names, numbers), "required": names}


def _example(name: str) -> dict[str, Any]:
    """A result as the engine makes it."""
    from tasks.copier.campaign.spec import CampaignSpec, campaign_result
    from tasks.copier.fork_spec import Clock, ForkSpec, succeeded
    from tasks.copier.report import Totals

    if name == "campaign-result":
        return dict(campaign_result(CampaignSpec(campaign_id="", source="/"), {}, []))
    spec = ForkSpec(fork_id="", source="/", destination="/")
    return dict(succeeded(spec, Totals(), 1, Clock(0.0)))
