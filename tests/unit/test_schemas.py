"""The JSON Schemas in docs/schemas: they are current, and accept what the program accepts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from tasks.contract.campaign_request import campaign_of
from tasks.contract.request_model import ForkRequest, parse_as
from tasks.contract.schemas import NAMES, schema
from tasks.copier.errors import ForkError

SCHEMAS = Path(__file__).parents[2] / "docs" / "schemas"
PATHS = {"source": "/a", "destination": "/b"}


def _accepts(name: str, document: object) -> bool:
    return not list(Draft202012Validator(schema(name)).iter_errors(document))


def test_there_is_a_file_for_each_schema() -> None:
    assert {path.stem for path in SCHEMAS.glob("*.json")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_what_the_program_prints_and_is_a_valid_schema(name: str) -> None:
    written = json.loads((SCHEMAS / f"{name}.json").read_text())

    assert written == schema(name), f"forkvm schema {name} > docs/schemas/{name}.json"
    Draft202012Validator.check_schema(written)
    assert re.fullmatch(rf"urn:forkvm:{name}:\d+", written["$id"])


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"reflink": "always", "snapshot": "never", "durability": "sync", "verify": "content"},
        {"skip": ["a/b"], "exclude": [], "preserve": ["mode"], "labels": {"a": "b"}},
        {"labels": ["a", "b"]},
        {"reflink": "maybe"},
        {"preserve": ["everything"]},
        {"source": "relative"},
        {"destination": None},
        {"labels": {"a": 1}},
        {"skip": "a"},
        {"exclude": ["x" * 4097]},
        {"unknown": 1},
    ],
)
def test_the_schema_of_a_fork_request_accepts_what_a_worker_accepts(fields: dict[str, Any]) -> None:
    try:
        parse_as(ForkRequest, PATHS | fields)
        is_valid = True
    except ForkError:
        is_valid = False

    assert _accepts("fork-request", PATHS | fields) == is_valid


@pytest.mark.parametrize(
    "fields",
    [
        {"destinations": ["/b", "/c"], "max_parallel": 4, "on_error": "abort", "deadline": 1.5},
        {"destinations": {"template": "/vm-{n:04}", "count": 10, "start": 0}},
        {"destinations": []},
        {"destinations": {"template": "/vm-{n}"}},
        {"destinations": ["/b"], "deadline": 0},
        {"destinations": ["/b"], "on_error": "panic"},
        {"destination": "/b"},
    ],
)
def test_the_schema_of_a_campaign_request_accepts_what_a_worker_accepts(fields: dict[str, Any]) -> None:
    try:
        campaign_of({"source": "/a"} | fields, "c", owner="local")
        is_valid = True
    except ForkError:
        is_valid = False

    assert _accepts("campaign-request", {"source": "/a"} | fields) == is_valid


@pytest.mark.parametrize("name", ["fork-result", "campaign-result", "file-result"])
def test_a_result_may_get_new_fields_and_lose_none(name: str) -> None:
    found = schema(name)

    assert "additionalProperties" not in found
    assert set(found["required"]) == set(found["properties"])
