"""The fields of a request."""

from __future__ import annotations

from typing import Any

import pytest

from tasks.contract.fork_request import spec_of
from tasks.contract.request_model import ForkRequest, parse_as
from tasks.copier.errors import Code, ForkError
from tasks.copier.fork_spec import ForkSpec
from tasks.copier.options import DEFAULT_EXCLUDE, PRESERVE_ALL, Options

#: The fields of Options in the journal of the previous version.
EARLIER_FIELDS = {"reflink", "snapshot", "skip", "exclude", "preserve", "durability", "verify"}
GOOD = {"source": "/guests/a", "destination": "/guests/b"}


def _parse(request: object) -> ForkRequest:
    return parse_as(ForkRequest, request)


def _refusal(request: object) -> ForkError:
    with pytest.raises(ForkError) as raised:
        _parse(request)
    assert raised.value.code is Code.INVALID_REQUEST
    return raised.value


def test_a_request_needs_two_paths_and_the_rest_has_defaults() -> None:
    options = _parse(GOOD).options()

    assert (options.reflink, options.snapshot) == ("auto", "auto")
    assert (options.durability, options.verify) == ("none", "none")
    assert options.skip == ()
    assert options.exclude == DEFAULT_EXCLUDE
    assert options.preserve == PRESERVE_ALL
    assert _parse(GOOD).labels == {}


def test_default_exclude_is_that_of_the_contract() -> None:
    assert DEFAULT_EXCLUDE == ("/logs/", "*.lz4.tmp", "*.zst.tmp", "*.sock")
    assert set(PRESERVE_ALL) == {"mode", "ownership", "timestamps", "xattrs", "hardlinks"}


def test_every_field_is_accepted() -> None:
    spec = spec_of(
        GOOD
        | {
            "reflink": "never",
            "snapshot": "never",
            "skip": ["a/b", "./c/"],
            "exclude": [],
            "preserve": ["mode"],
            "durability": "sync",
            "verify": "content",
            "max_copied_bytes": 0,
            "source_open": "refuse",
            "cache": "drop",
            "labels": ["x"],
        },
        "fork-1",
        owner="queue",
        queued=1.5,
    )

    assert (spec.fork_id, spec.source, spec.destination) == ("fork-1", "/guests/a", "/guests/b")
    assert (spec.options.reflink, spec.options.snapshot) == ("never", "never")
    assert (spec.options.durability, spec.options.verify) == ("sync", "content")
    assert spec.options.max_copied_bytes == 0
    assert (spec.options.source_open, spec.options.cache) == ("refuse", "drop")
    assert spec.options.skip == ("a/b", "c")
    assert spec.options.exclude == ()
    assert spec.options.preserve == {"mode"}
    assert (spec.labels, spec.owner, spec.queued) == (["x"], "queue", 1.5)


def test_fields_unknown_to_an_earlier_version_are_written_only_if_they_are_used() -> None:
    plain, used = Options(), Options(source_open="refuse", cache="drop")

    assert set(plain.to_data()) == EARLIER_FIELDS
    assert set(used.to_data()) == EARLIER_FIELDS | {"source_open", "cache"}
    assert Options.from_data(plain.to_data()) == plain
    assert Options.from_data(used.to_data()) == used


@pytest.mark.parametrize(
    ("path", "normal"),
    [("/a//b", "/a/b"), ("/a/./b/", "/a/b"), ("//a", "/a"), ("/", "/"), ("/\udcff", "/\udcff"), ("/...", "/...")],
)
def test_paths_are_normalized(path: str, normal: str) -> None:
    assert _parse(GOOD | {"destination": path}).destination == normal


@pytest.mark.parametrize("path", ["/a//b/", "/\udcff", "", "a", "/..", "/a\0b", "/a" * 2048, "/.forkvm-0.1/x"])
@pytest.mark.parametrize("field", ["source", "destination"])
def test_a_request_of_two_paths_is_validated_like_one_with_options(field: str, path: str) -> None:
    request = GOOD | {field: path}

    def outcome(request: dict[str, Any]) -> object:
        try:
            return spec_of(request, "fork-1", owner="queue")
        except ForkError as error:
            return error.record()

    plain, with_option = outcome(request), outcome(request | {"reflink": "auto"})

    if isinstance(plain, ForkSpec) and isinstance(with_option, ForkSpec):
        assert plain.is_same_request(with_option)
    else:
        assert plain == with_option


@pytest.mark.parametrize("field", ["source", "destination"])
@pytest.mark.parametrize("path", ["", "a", "./a", "../a", "/a/../b", "/..", "/a\0b", "/\ud800", "/a" * 2048])
def test_path_that_cannot_be_opened_safely_is_refused(field: str, path: str) -> None:
    error = _refusal(GOOD | {field: path})

    assert error.path == path
    assert field in error.message


@pytest.mark.parametrize("field", ["source", "destination"])
@pytest.mark.parametrize("path", ["/g/.forkvm-0123456789abcdef", "/g/.forkvm-0123456789abcdef.01234567/vm"])
def test_path_through_a_staging_name_is_refused(field: str, path: str) -> None:
    error = _refusal(GOOD | {field: path})

    assert (error.path, field in error.message, "staging" in error.message) == (path, True, True)


def test_the_longest_path_is_accepted_and_one_byte_more_is_not() -> None:
    longest = "/" + "ä" * 2047  # 4095 bytes
    assert _parse(GOOD | {"source": longest}).source == longest
    _refusal(GOOD | {"source": longest + "a"})


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"colour": "blue"}, "colour"),
        ({"source": None}, "source"),
        ({"source": 1}, "source"),
        ({"source": ["/a"]}, "source"),
        ({"source": b"/a"}, "source"),
        ({"reflink": "yes"}, "reflink"),
        ({"reflink": None}, "reflink"),
        ({"durability": True}, "durability"),
        ({"verify": 1}, "verify"),
        ({"max_copied_bytes": -1}, "max_copied_bytes"),
        ({"max_copied_bytes": 1.5}, "max_copied_bytes"),
        ({"max_copied_bytes": True}, "max_copied_bytes"),
        ({"max_copied_bytes": "1G"}, "max_copied_bytes"),
        ({"max_copied_bytes": 1 << 63}, "max_copied_bytes"),
        ({"skip": "a"}, "skip"),
        ({"skip": ["/a"]}, "skip"),
        ({"skip": ["a/../b"]}, "skip"),
        ({"skip": ["a\0b"]}, "skip"),
        ({"skip": [1]}, "skip"),
        ({"skip": {"a": 1}}, "skip"),
        ({"skip": ["a"] * 10_001}, "skip"),
        ({"exclude": ["*" * 5000]}, "exclude"),
        ({"exclude": [None]}, "exclude"),
        ({"preserve": ["all"]}, "preserve"),
        ({"preserve": "mode"}, "preserve"),
        ({"labels": "a"}, "labels"),
        ({"labels": [1]}, "labels"),
        ({"labels": {"a": 1}}, "labels"),
    ],
)
def test_invalid_field_is_refused_by_name(fields: dict[str, Any], named: str) -> None:
    error = _refusal(GOOD | fields)

    assert named in error.message
    assert "\n" not in error.message


@pytest.mark.parametrize("request_", [None, 1, "x", [], [GOOD], b"{}", {}, {"source": "/a"}, {"destination": "/b"}])
def test_an_incomplete_request_is_refused(request_: object) -> None:
    _refusal(request_)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"colour": 1}, "colour: there is no such field; remove it"),
        ({"reflink": "x"}, "reflink: it must be 'auto', 'always' or 'never'"),
        ({"skip": ["/a"]}, "skip.0: give a path relative to the source, without '..'"),
        ({"labels": {"a": 1}}, "labels.a: it must be a string; labels: it must be a valid list"),
    ],
)
def test_a_message_is_about_the_request_and_not_about_the_program(fields: dict[str, Any], message: str) -> None:
    assert _refusal(GOOD | fields).message == message


def test_a_missing_field_is_named() -> None:
    assert _refusal({"source": "/a", "reflink": "auto"}).message == "destination: the field is missing"


def test_all_errors_are_reported_at_once() -> None:
    message = _refusal(GOOD | {"reflink": "x", "skip": [1], "colour": 1}).message

    assert all(name in message for name in ("reflink", "skip.0", "colour"))


@pytest.mark.parametrize("text", ["\udcff", "ключ", "", "a\nb"])
def test_text_is_not_changed(text: str) -> None:
    request = _parse(GOOD | {"labels": {text: text}, "exclude": [text or "x"], "skip": [text or "x"]})

    assert request.labels == {text: text}
    assert request.options().exclude == (text or "x",)


def test_a_dry_run_is_refused_in_favour_of_an_estimate() -> None:
    error = _refusal(GOOD | {"dry_run": True})

    assert "forkvm.estimate" in error.message
    assert "forkvm estimate" in error.message
