"""The settings, from an environment."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tasks.copier.options import Limits
from worker.settings import BadSettings, Settings, read_settings

Read = Callable[[dict[str, str]], Settings]


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Read:
    """Read the settings of an environment with these variables only."""

    def read_environment(environment: dict[str, str]) -> Settings:
        for name in os.environ:
            monkeypatch.delenv(name)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return read_settings()

    return read_environment


def test_without_any_variable_all_have_their_defaults(read: Read) -> None:
    settings = read({})

    assert settings.broker_url == "redis://localhost:6379/0"
    assert settings.result_backend == ""
    assert settings.roots == ()
    assert settings.queue == "forkvm"
    assert settings.result_expires == 86_400
    assert settings.limits == Limits()


def test_each_variable_is_read(read: Read) -> None:
    settings = read(
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
            "FORKVM_HTTP": "127.0.0.1:9440",
            "FORKVM_COPY_RATE": "100000000",
            "FORKVM_IO_PRIORITY": "best-effort:7",
            "FORKVM_RUNTIME_DIR": "/run/other",
            "FORKVM_LOG": "json",
            "FORKVM_LOG_LEVEL": "warning",
        }
    )

    assert (settings.copy_pace.directory, settings.copy_pace.configured) == ("/run/other", 100_000_000)
    assert settings.io_priority == "best-effort:7"
    assert (settings.broker_url, settings.result_backend) == ("redis://a:1/2", "redis://b:1/2")
    assert settings.queue == "forkvm.rack-7"
    assert (settings.result_expires, settings.visibility_timeout) == (3600, 60)
    assert settings.task_time_limit == 600
    assert settings.limits == Limits(inline_files=1, inline_bytes=2, chunk_files=3, chunk_bytes=4 << 20, max_chunks=5)
    assert settings.heartbeat_file == "/run/heartbeat"
    assert settings.http == ("127.0.0.1", 9440)
    assert (settings.log, settings.log_level) == ("json", "WARNING")


@pytest.mark.parametrize(
    ("value", "roots"),
    [
        ("/guests", ("/guests",)),
        ("/guests:/snapshots", ("/guests", "/snapshots")),
        ("/guests/:/a//b/./c", ("/guests", "/a/b/c")),
        (":/guests:", ("/guests",)),
        ("/guests/\udcff", ("/guests/\udcff",)),  # a byte that is not UTF-8
        ("/", ("/",)),
    ],
)
def test_roots_are_separated_by_colons_and_normalized(read: Read, value: str, roots: tuple[str, ...]) -> None:
    settings = read({"FORKVM_ROOTS": value})

    assert settings.roots == roots


def test_empty_variable_counts_as_unset(read: Read) -> None:
    assert read({"FORKVM_ROOTS": "", "FORKVM_RESULT_EXPIRES": ""}) == read({})


def test_variables_of_other_programs_are_ignored(read: Read) -> None:
    assert read({"PATH": "/bin", "CELERY_BROKER_URL": "x", "XFORKVM_DOMAIN": "y"}) == read({})


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
        ("FORKVM_COPY_RATE", "65535"),
        ("FORKVM_COPY_RATE", "fast"),
        ("FORKVM_IO_PRIORITY", "best-effort:8"),
        ("FORKVM_IO_PRIORITY", "realtime:0"),
        ("FORKVM_DOMAIN", "a/b"),
        ("FORKVM_DOMAIN", "a#b"),
        ("FORKVM_ROOTS", "/guests:relative"),
    ],
)
def test_invalid_value_is_refused_by_name(read: Read, name: str, value: str) -> None:
    with pytest.raises(BadSettings, match=name):
        read({name: value})


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("RESULT_EXPIRES", "5.5", "it must be an integer"),
        ("RESULT_EXPIRES", "\u0667\u0668", "it must be an integer"),
        ("RESULT_EXPIRES", "-60", "it must be at least 60"),
        ("MAX_CHUNKS", "10001", "it must be at most 10000"),
        ("DOMAIN", "a b\n", "it must consist of letters, digits, '_', '.' and '-'"),
        ("NAME", "a" * 65, "it must have at most 64 characters"),
        ("ROOTS", "/guests:relative", "relative is not an absolute path"),
    ],
)
def test_message_describes_valid_values(read: Read, name: str, value: str, text: str) -> None:
    with pytest.raises(BadSettings) as raised:
        read({f"FORKVM_{name}": value})

    assert str(raised.value) == f"FORKVM_{name}: {text}"


@pytest.mark.parametrize("value", ["60", " 60 ", "+60", "0060", "6_0", "60.0"])
def test_number_may_be_written_in_several_ways(read: Read, value: str) -> None:
    assert read({"forkvm_result_expires": value}).result_expires == 60


def test_all_errors_are_reported_at_once_in_one_line(read: Read) -> None:
    with pytest.raises(BadSettings) as raised:
        read({"FORKVM_CHUNK_FILES": "x", "FORKVM_MAX_CHUNKS": "y"})

    message = str(raised.value)
    assert "FORKVM_CHUNK_FILES" in message
    assert "FORKVM_MAX_CHUNKS" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "others",
    [
        # Variables that Kubernetes sets for a Service named forkvm, forkvm-redis or forkvm-name.
        {"FORKVM_SERVICE_HOST": "10.0.0.1", "FORKVM_SERVICE_PORT": "80", "FORKVM_SERVICE_PORT_HTTP": "80"},
        {"FORKVM_PORT": "tcp://10.0.0.1:80", "FORKVM_PORT_80_TCP": "tcp://10.0.0.1:80"},
        {"FORKVM_PORT_80_TCP_PROTO": "tcp", "FORKVM_PORT_80_TCP_PORT": "80", "FORKVM_PORT_80_TCP_ADDR": "10.0.0.1"},
        {"FORKVM_REDIS_SERVICE_HOST": "10.0.0.1", "FORKVM_REDIS_PORT": "tcp://10.0.0.1:6379"},
        {"FORKVM_REDIS_PORT_6379_UDP": "udp://10.0.0.1:6379", "FORKVM_REDIS_PORT_6379_SCTP_ADDR": "10.0.0.1"},
        {"FORKVM_NAME_SERVICE_HOST": "10.0.0.1", "FORKVM_NAME_PORT": "tcp://[fd00::1]:80"},
        # Variables of docker-compose.yml.
        {"FORKVM_GUESTS": "/srv/guests", "FORKVM_USER": "0:0"},
        # Without a value.
        {"FORKVM_COLOUR": ""},
    ],
)
def test_variables_set_by_other_software_are_ignored_without_a_warning(
    read: Read, capsys: pytest.CaptureFixture[str], others: dict[str, str]
) -> None:
    assert read(others) == read({})
    assert capsys.readouterr() == ("", "")


def test_unknown_variable_is_ignored_with_one_warning_a_process_and_a_suggestion(
    read: Read, capsys: pytest.CaptureFixture[str]
) -> None:
    environment = {"FORKVM_DOMIAN": "rack-7", "FORKVM_PORT": "6379", "FORKVM_\x1b[2J": "x"}

    assert read(environment) == read(environment) == read({})

    assert sorted(capsys.readouterr().err.splitlines()) == [
        "forkvm: FORKVM_DOMIAN is not a setting and is ignored; did you mean FORKVM_DOMAIN?",
        "forkvm: FORKVM_PORT is not a setting and is ignored",
        "forkvm: FORKVM_\\x1b[2J is not a setting and is ignored",
    ]


def test_secret_file_gives_a_setting_unless_a_variable_does(read: Read, tmp_path: Path) -> None:
    (tmp_path / "forkvm_broker_url").write_text("redis://:secret@a:1/2\n")
    (tmp_path / "forkvm_domain").write_text("rack-7")
    (tmp_path / "another_secret").write_bytes(b"\xff")
    secrets = {"FORKVM_SECRETS_DIR": str(tmp_path)}

    assert read(secrets).broker_url == "redis://:secret@a:1/2"
    assert read(secrets).domain == "rack-7"
    assert read(secrets | {"FORKVM_DOMAIN": "rack-8"}).domain == "rack-8"
    assert read_settings(domain="rack-9").domain == "rack-9"


def test_secret_is_read_from_its_directory_only(read: Read, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mount, elsewhere = tmp_path / "mount", tmp_path / "elsewhere"
    (mount / "..data").mkdir(parents=True)
    elsewhere.write_text("elsewhere")
    (mount / "..data" / "FORKVM_DOMAIN").write_text("rack-7")
    (mount / "FORKVM_DOMAIN").symlink_to("..data/FORKVM_DOMAIN")  # in the layout of Kubernetes
    (mount / "forkvm_name").symlink_to(elsewhere)
    (mount / "forkvm_redis_password").mkdir()

    settings = read({"FORKVM_SECRETS_DIR": str(mount)})

    assert (settings.domain, settings.name, settings.redis_password) == ("rack-7", "", "")
    ignored = "in the secrets directory is not a file of that directory and is ignored"
    assert sorted(capsys.readouterr().err.splitlines()) == [
        f"forkvm: forkvm_name {ignored}",
        f"forkvm: forkvm_redis_password {ignored}",
    ]


def test_unreadable_or_invalid_secret_is_refused_without_quoting_it(read: Read, tmp_path: Path) -> None:
    secrets = {"FORKVM_SECRETS_DIR": str(tmp_path)}
    for content in (b"redis://:s3cret\xff@a", b"redis://:s3cret/@a", b"redis://:s3cret@" + bytes(2 << 20)):
        (tmp_path / "forkvm_broker_url").write_bytes(content)
        with pytest.raises(BadSettings, match=r"FORKVM_(SECRETS_DIR|BROKER_URL): ") as raised:
            read(secrets)
        assert "s3cret" not in str(raised.value)
    with pytest.raises(BadSettings, match="FORKVM_SECRETS_DIR"):
        read({"FORKVM_SECRETS_DIR": str(tmp_path / "none")})
