"""CampaignRequest: the destinations that it names, and the requests that it refuses before anything is done."""

from __future__ import annotations

import os
from typing import Any

import pytest

from tasks.contract.campaign_request import campaign_of, refused_campaign, summary_of
from tasks.copier.errors import Code, ForkError


def paths_of(destinations: object, **fields: Any) -> list[str]:
    """The destinations of a request, as the engine receives them."""
    _, paths = campaign_of({"source": "/a", "destinations": destinations, **fields}, "c", owner="queue")
    return paths


def refusal(destinations: object, **fields: Any) -> str:
    """The message with which a request is refused."""
    with pytest.raises(ForkError) as raised:
        paths_of(destinations, **fields)
    assert raised.value.code is Code.INVALID_REQUEST
    return raised.value.message


def test_a_list_keeps_its_order_and_is_numbered_from_one() -> None:
    spec, paths = campaign_of({"source": "/a", "destinations": ["/z", "/b/c", "/b/a"]}, "c", owner="queue")

    assert paths == ["/z", "/b/c", "/b/a"]
    assert [spec.fork_id(n) for n in range(3)] == ["c.1", "c.2", "c.3"]
    assert spec.aims.count == 3


@pytest.mark.parametrize(
    ("template", "first", "last"),
    [
        ("/g/vm-{n}", "/g/vm-9", "/g/vm-11"),
        ("/g/vm-{n:04}", "/g/vm-0009", "/g/vm-0011"),
        ("/g/vm-{n:3}", "/g/vm-  9", "/g/vm- 11"),
        ("/g/vm-{n:04d}", "/g/vm-0009", "/g/vm-0011"),
        ("/g/{n}/vm-{n:02}", "/g/9/vm-09", "/g/11/vm-11"),
        ("/g/{{vm}}-{n}", "/g/{vm}-9", "/g/{vm}-11"),
        ("//g/./vm-{n}/", "/g/vm-9", "/g/vm-11"),
    ],
)
def test_a_template_is_numbered_from_its_start(template: str, first: str, last: str) -> None:
    request = {"source": "/a", "destinations": {"template": template, "count": 3, "start": 9}}

    spec, paths = campaign_of(request, "c", owner="queue")

    assert (paths[0], paths[2], len(paths)) == (first, last, 3)
    assert (spec.fork_id(0), spec.fork_id(2)) == ("c.9", "c.11")


@pytest.mark.parametrize(
    "template",
    [
        "/g/{n.__class__}",
        "/g/{n.__class__.__mro__[1].__subclasses__}",
        "/g/{n[0]}",
        "/g/{n!r}",
        "/g/{0}",
        "/g/{}",
        "/g/{m}",
        "/g/{n:{n}}",
        "/g/{n:9999999}",
        "/g/{n:>10}",
        "/g/{n:x}",
        "/g/{n:,}",
        "/g/{n:+04}",
        "/g/{n:.5}",
        "/g/{n",
        "/g/n}",
        "/g/{n:\n4}",
        "/g/{n:٤}",
        "/g/{ n}",
    ],
)
def test_an_invalid_template_is_refused(template: str) -> None:
    assert "template" in refusal({"template": template, "count": 2})


def test_a_template_without_n_is_valid_for_one_path_only() -> None:
    assert paths_of({"template": "/g/vm", "count": 1}) == ["/g/vm"]
    assert paths_of({"template": "/g/{{}}", "count": 1}) == ["/g/{}"]
    assert "twice" in refusal({"template": "/g/vm", "count": 2})
    assert "twice" in refusal({"template": "/g/{{}}", "count": 2})


@pytest.mark.parametrize(
    "destinations",
    [["/g/a", "/g/b", "/g/a"], ["/g/a", "/g/a/"], ["/g/a", "//g//a"], ["/g/a", "/g/./a"]],
)
def test_a_repeated_destination_in_any_spelling_is_refused(destinations: list[str]) -> None:
    assert "twice" in refusal(destinations)


@pytest.mark.parametrize(
    "destinations",
    [
        ["/g/a", "/g/a/b"],
        ["/g/a/b/c/d", "/g/a"],
        ["/g/a//b", "/g/x", "/g/a/"],
        ["/", "/a"],
        ["/a", "/"],
    ],
)
def test_a_destination_inside_another_is_refused(destinations: list[str]) -> None:
    assert "inside" in refusal(destinations)


def test_names_with_a_common_prefix_are_not_inside_each_other() -> None:
    assert paths_of(["/g/a", "/g/ab", "/g/a.b", "/g/a b"]) == ["/g/a", "/g/ab", "/g/a.b", "/g/a b"]


def test_names_that_are_not_utf8_are_used_byte_for_byte() -> None:
    path = os.fsdecode(b"/g/\xff\xfe")

    assert paths_of([path]) == [path]
    assert os.fsencode(paths_of({"template": path + "-{n}", "count": 1})[0]) == b"/g/\xff\xfe-1"
    assert "surrogate" in refusal(["/g/\ud800"])


@pytest.mark.parametrize(
    "destinations",
    [
        [],
        "/g/a",
        None,
        7,
        ["/g/a", 7],
        ["/g/a", None],
        [["/g/a"]],
        {},
        {"template": "/g/{n}"},
        {"count": 2},
        {"template": "/g/{n}", "count": 0},
        {"template": "/g/{n}", "count": -1},
        {"template": "/g/{n}", "count": 1_000_001},
        {"template": "/g/{n}", "count": 10**30},
        {"template": "/g/{n}", "count": "2"},
        {"template": "/g/{n}", "count": 2.0},
        {"template": "/g/{n}", "count": True},
        {"template": "/g/{n}", "count": 2, "start": -1},
        {"template": "/g/{n}", "count": 2, "start": "1"},
        {"template": "/g/{n}", "count": 2, "start": 10**30},
        {"template": "/g/{n}", "count": 2, "step": 2},
        {"template": 7, "count": 2},
        {"template": ["/g/{n}"], "count": 2},
    ],
)
def test_destinations_of_another_shape_are_refused_and_named(destinations: object) -> None:
    assert "destinations" in refusal(destinations)


@pytest.mark.parametrize("path", ["g/a", "", "/g/../a", "/g/a\0b", "/" + "x" * 5000])
def test_an_invalid_path_is_refused(path: str) -> None:
    refusal(["/g/ok", path])


@pytest.mark.parametrize(
    "fields",
    [
        {"max_parallel": 0},
        {"max_parallel": -1},
        {"max_parallel": 1.5},
        {"max_parallel": "4"},
        {"on_error": "stop"},
        {"on_error": None},
        {"deadline": 0},
        {"deadline": -1},
        {"deadline": 1e12},
        {"deadline": float("nan")},
        {"deadline": float("inf")},
        {"deadline": "60"},
        {"destination": "/g/a"},
        {"unknown": 1},
        {"reflink": "maybe"},
        {"preserve": ["nothing"]},
        {"labels": {"a": 1}},
    ],
)
def test_an_unknown_or_invalid_field_is_refused_and_named(fields: dict[str, Any]) -> None:
    (name,) = fields

    assert name in refusal(["/g/a"], **fields)


@pytest.mark.parametrize("request_", [None, 7, "text", [], [{}], {}, {"source": "/a"}, {"destinations": ["/b"]}])
def test_a_value_that_is_no_request_is_refused(request_: object) -> None:
    with pytest.raises(ForkError) as raised:
        campaign_of(request_, "c", owner="queue")

    result = refused_campaign(request_, "c", raised.value)
    assert (result["status"], result["forks"]["total"], result["failures"]) == ("failed", 0, [])
    assert result["error"] is not None
    assert result["error"]["code"] == "invalid_request"


def test_all_options_of_a_single_fork_apply_to_every_fork() -> None:
    request = {
        "source": "/a",
        "destinations": ["/b"],
        "reflink": "always",
        "skip": ["x"],
        "exclude": ["*.y"],
        "preserve": ["mode"],
        "durability": "sync",
        "verify": "content",
        "labels": {"rack": "7"},
        "max_parallel": 3,
        "on_error": "abort",
        "deadline": 60,
    }

    spec, paths = campaign_of(request, "c", owner="queue", queued=1.5)
    fork = spec.fork(0, paths[0], spec.started + 2)

    options = fork.options
    assert (options.reflink, options.durability, options.verify) == ("always", "sync", "content")
    assert (options.skip, options.exclude, options.preserve) == (("x",), ("*.y",), frozenset({"mode"}))
    assert (fork.fork_id, fork.source, fork.destination, fork.labels) == ("c.1", "/a", "/b", {"rack": "7"})
    assert fork.queued == pytest.approx(3.5)
    assert (spec.aims.max_parallel, spec.aims.on_error) == (3, "abort")
    assert spec.aims.deadline == pytest.approx(spec.started + 60)


def test_a_summary_omits_a_long_list_of_destinations() -> None:
    request = {"source": "/a", "destinations": [f"/g/{n:040}" for n in range(10_000)], "reflink": "always"}
    spec, _ = campaign_of(request, "c", owner="queue")

    summary = summary_of(request, spec)

    assert summary["kept"] == {"source": "/a", "reflink": "always"}
    assert (summary["forks"], summary["start"]) == (10_000, 1)


def test_a_summary_contains_a_small_request_completely_and_distinguishes_requests() -> None:
    request = {"source": "/a", "destinations": {"template": "/g/{n}", "count": 100_000}, "labels": {"x": "y"}}
    spec, _ = campaign_of(request, "c", owner="queue")

    summary = summary_of(request, spec)

    assert summary["kept"] == request
    assert (summary["forks"], summary["start"]) == (100_000, 1)
    assert summary == summary_of(dict(reversed(request.items())), spec)
    assert summary["sha256"] != summary_of(request | {"labels": {"x": "z"}}, spec)["sha256"]


@pytest.mark.parametrize(
    "destinations",
    [
        ["/g/vm-1", "/g/.forkvm-0123456789abcdef"],
        ["/g/vm-1", "/g/.forkvm-0123456789abcdef.01234567/vm-2"],
        {"template": "/g/.forkvm-{n:016}", "count": 1, "start": 7},
        {"template": "/g/.forkvm-0123456789abcdef/vm-{n}", "count": 2},
        {"template": "/g/.forkvm-012345678{n}", "count": 2, "start": 9999998},
    ],
)
def test_destinations_through_a_staging_name_are_refused(destinations: object) -> None:
    assert "looks like a staging name" in refusal(destinations)
