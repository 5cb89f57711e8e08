"""The settings, from an environment."""

from __future__ import annotations

import pytest

from tasks.copier.options import Limits
from worker.settings import BadSettings, read_settings, roots_of


def test_without_any_variable_all_have_their_defaults() -> None:
    settings = read_settings({})

    assert settings.broker_url == "redis://localhost:6379/0"
    assert settings.result_backend == ""
    assert settings.roots == ()
    assert settings.queue == "forkvm"
    assert settings.result_expires == 86_400
    assert settings.limits == Limits()


def test_each_variable_is_taken() -> None:
    settings = read_settings(
        {
            "FORKVM_BROKER_URL": "redis://a:1/2",
            "FORKVM_RESULT_BACKEND": "redis://b:1/2",
            "FORKVM_DOMAIN": "rack-7",
            "FORKVM_RESULT_EXPIRES": "3600",
            "FORKVM_VISIBILITY_TIMEOUT": "60",
            "FORKVM_TASK_TIME_LIMIT": "600",
            "FORKVM_INLINE_FILES": "1",
            "FORKVM_INLINE_BYTES": "2",
            "FORKVM_CHUNK_FILES": "3",
            "FORKVM_CHUNK_BYTES": "4194304",
            "FORKVM_MAX_CHUNKS": "5",
            "FORKVM_HEARTBEAT_FILE": "/run/heartbeat",
        }
    )

    assert (settings.broker_url, settings.result_backend) == ("redis://a:1/2", "redis://b:1/2")
    assert settings.queue == "forkvm.rack-7"
    assert (settings.result_expires, settings.visibility_timeout) == (3600, 60)
    assert settings.task_time_limit == 600
    assert settings.limits == Limits(inline_files=1, inline_bytes=2, chunk_files=3, chunk_bytes=4 << 20, max_chunks=5)
    assert settings.heartbeat_file == "/run/heartbeat"


@pytest.mark.parametrize(
    ("value", "roots"),
    [
        ("/guests", ("/guests",)),
        ("/guests:/snapshots", ("/guests", "/snapshots")),
        ("/guests/:/a//b/./c", ("/guests", "/a/b/c")),
        (":/guests:", ("/guests",)),
        ("/", ("/",)),
    ],
)
def test_roots_are_separated_by_colons_and_made_normal(value: str, roots: tuple[str, ...]) -> None:
    settings = read_settings({"FORKVM_ROOTS": value})

    assert settings.roots == roots
    assert roots_of(settings).paths == roots


def test_empty_variable_counts_as_unset() -> None:
    assert read_settings({"FORKVM_ROOTS": "", "FORKVM_RESULT_EXPIRES": ""}) == read_settings({})


def test_variables_of_others_are_left_alone() -> None:
    assert read_settings({"PATH": "/bin", "CELERY_BROKER_URL": "x", "XFORKVM_DOMAIN": "y"}) == read_settings({})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("FORKVM_RESULT_EXPIRES", "soon"),
        ("FORKVM_RESULT_EXPIRES", "59"),
        ("FORKVM_VISIBILITY_TIMEOUT", "0"),
        ("FORKVM_INLINE_FILES", "-1"),
        ("FORKVM_CHUNK_FILES", "0"),
        ("FORKVM_CHUNK_BYTES", "1048575"),
        ("FORKVM_MAX_CHUNKS", "10001"),
        ("FORKVM_DOMAIN", "a/b"),
        ("FORKVM_DOMAIN", "a#b"),
        ("FORKVM_ROOTS", "/guests:relative"),
        ("FORKVM_NO_SUCH", "1"),
    ],
)
def test_value_that_cannot_be_meant_is_refused_by_name(name: str, value: str) -> None:
    with pytest.raises(BadSettings, match=name):
        read_settings({name: value})


def test_all_that_is_wrong_is_told_at_once_in_one_line() -> None:
    with pytest.raises(BadSettings) as raised:
        read_settings({"FORKVM_CHUNK_FILES": "x", "FORKVM_MAX_CHUNKS": "y"})

    message = str(raised.value)
    assert "FORKVM_CHUNK_FILES" in message
    assert "FORKVM_MAX_CHUNKS" in message
    assert "\n" not in message
