"""The settings. Each is an environment variable `FORKVM_*`, or a file of that name in the secrets directory.

They are read without pydantic, whose import takes as long as a small local fork.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Literal, TypeVar, cast, get_args

from tasks.copier.copy_rate import LEAST_RATE, CopyRate
from tasks.copier.options import Limits
from worker.environment import new_warnings, unknown_variables
from worker.redis_url import SENTINEL, RedisUrl, read_redis_url
from worker.secret_files import read_secret_files

T = TypeVar("T")

_PREFIX = "FORKVM_"
#: The variable that names the secrets directory. Its file `forkvm_broker_url`, for example, holds that setting.
_SECRETS = "FORKVM_SECRETS_DIR"
#: The default secrets directory, which docker and compose use.
_SECRETS_DIRECTORY = "/run/secrets"
#: What a name of a domain or worker may consist of.
_NAME = "^[A-Za-z0-9_.-]*$"
#: An integer, perhaps with underscores between its digits, or with zeros after a point.
_INTEGER = re.compile(r"([+-]?[0-9]+(?:_[0-9]+)*)(?:\.0+)?")
_RUNTIME = "/run/forkvm"
#: Some 30 years: Redis and the kernel take no time that is much longer.
_LONGEST_SECONDS = 1_000_000_000
_IO_PRIORITY = re.compile("none|idle|best-effort:[0-7]")
#: The message of a worker that is started without roots.
NO_ROOTS = "no roots: set FORKVM_ROOTS to the directories that the worker may use, separated by colons"


#: The styles of a worker's log: text, or a JSON object a line.
LogStyle = Literal["console", "json"]
#: The levels of a worker's log.
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


class BadSettings(Exception):
    """A setting is invalid. The message names each invalid setting, and never contains a value that may be secret."""


class NoBroker(Exception):
    """Redis cannot be reached. The message names its address and the reason."""


def _setting(default: T, read: Callable[[str], T]) -> T:
    """A field of Settings. `read` returns the value of its text, or raises ValueError with what is wrong with it."""
    return field(default=default, metadata={"read": read})


def _text(value: str) -> str:
    return value


def _paths(value: str) -> tuple[str, ...]:
    paths = tuple(os.path.normpath(path) for path in value.split(":") if path)
    for path in paths:
        if not path.startswith("/"):
            raise ValueError(f"{path} is not an absolute path")
    return paths


def _redis_url(value: str) -> str:
    read_redis_url(value)
    return value


def _redis_url_or_empty(value: str) -> str:
    return value and _redis_url(value)


def _name(most: int = sys.maxsize) -> Callable[[str], str]:
    def read(value: str) -> str:
        if len(value) > most:
            raise ValueError(f"it must have at most {most} characters")
        if not re.fullmatch(_NAME, value):
            raise ValueError("it must consist of letters, digits, '_', '.' and '-'")
        return value

    return read


def _integer(least: int, most: int | None = None) -> Callable[[str], int]:
    def read(value: str) -> int:
        known = _INTEGER.fullmatch(value.strip())
        if known is None:
            raise ValueError("it must be an integer")
        if (number := int(known[1])) < least:
            raise ValueError(f"it must be at least {least}")
        if most is not None and number > most:
            raise ValueError(f"it must be at most {most}")
        return number

    return read


def _log_style(value: str) -> LogStyle:
    if value not in get_args(LogStyle):
        raise ValueError(f"it must be one of {', '.join(get_args(LogStyle))}")
    return cast(LogStyle, value)


def _log_level(value: str) -> str:
    if value.upper() not in LOG_LEVELS:
        raise ValueError(f"it must be one of {', '.join(LOG_LEVELS)}")
    return value.upper()


def read_address(value: str) -> tuple[str, int]:
    """The host and the port of HOST:PORT, where an IPv6 address is in brackets. Raises ValueError."""
    host, colon, port = value.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        host = ""
    if not (host and colon and port.isascii() and port.isdigit() and len(port) <= 5 and int(port) < 1 << 16):
        raise ValueError("it must be HOST:PORT, for example 127.0.0.1:9440 or [::]:9440")
    return host, int(port)


def _io_priority(value: str) -> str:
    if not _IO_PRIORITY.fullmatch(value):
        raise ValueError("it must be none, idle, or best-effort:0 (the highest) to best-effort:7")
    return value


def default_runtime_directory() -> str:
    """/run/forkvm if it exists, since it is the same for all users of the host; else one of this user in memory."""
    return _RUNTIME if os.path.isdir(_RUNTIME) else f"/dev/shm/forkvm-{os.geteuid()}"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All settings with their defaults. Sizes are in bytes, times in seconds."""

    broker_url: str = _setting("redis://localhost:6379/0", _redis_url)
    #: Redis of the results; the broker's by default.
    result_backend: str = _setting("", _redis_url_or_empty)
    #: The password of Redis, for URLs without one. Meant for the secrets directory.
    redis_password: str = _setting("", _text)
    #: PEM file of the authorities that a `rediss://` server's certificate is verified with; the system's by default.
    redis_ca: str = _setting("", _text)
    #: The name of the master at the sentinels of a `sentinel://` URL.
    sentinel_master: str = _setting("", _text)
    #: The password of the sentinels, if they have one.
    sentinel_password: str = _setting("", _text)
    #: Directories in which a worker may fork, separated by colons. It accepts no paths outside of them.
    roots: tuple[str, ...] = _setting((), _paths)
    #: Name of the hosts that share a filesystem. The queue is named after it.
    domain: str = _setting("", _name())
    #: TTL of everything that Redis holds about a fork.
    result_expires: int = _setting(86_400, _integer(60, _LONGEST_SECONDS))
    #: Time after which a dead worker's messages are redelivered. A live worker renews its messages every 2 s.
    visibility_timeout: int = _setting(10, _integer(5, _LONGEST_SECONDS))
    #: A process whose task takes longer is killed, and another process does the task again.
    task_time_limit: int = _setting(14_400, _integer(1, _LONGEST_SECONDS))
    #: Number of pool processes of a worker; by default the number of CPUs that it may use (`worker.cpus`).
    concurrency: int | None = _setting(None, _integer(1))
    #: The worker's name among Celery's nodes; see `worker.runtime.node_name`.
    name: str = _setting("", _name(64))
    #: See `tasks.copier.options.Limits`.
    inline_files: int = _setting(Limits.inline_files, _integer(0))
    inline_bytes: int = _setting(Limits.inline_bytes, _integer(0))
    chunk_files: int = _setting(Limits.chunk_files, _integer(1))
    chunk_bytes: int = _setting(Limits.chunk_bytes, _integer(1 << 20))
    max_chunks: int = _setting(Limits.max_chunks, _integer(1, 10_000))
    #: Bytes per second that all workers and local forks of the host may copy together; by default, as many as they can.
    copy_rate: int | None = _setting(None, _integer(LEAST_RATE))
    #: I/O priority of the processes that clone; see `tasks.copier.io_priority`.
    io_priority: str = _setting("none", _io_priority)
    #: Directory that all workers and local forks of the host share; see `default_runtime_directory`.
    runtime_dir: str = _setting("", _text)
    #: File that a worker touches while it consumes, for a health check; empty for none.
    heartbeat_file: str = _setting("", _text)
    #: The host and port at which a worker serves metrics and health; None for nowhere.
    http: tuple[str, int] | None = _setting(None, read_address)
    #: The style of a worker's log; None: text on a terminal, JSON elsewhere.
    log: Literal["console", "json"] | None = _setting(None, _log_style)
    #: The least level of lines in a worker's log; empty for Celery's option.
    log_level: str = _setting("", _log_level)

    @property
    def queue(self) -> str:
        """The name of the domain's queue."""
        return f"forkvm.{self.domain}" if self.domain else "forkvm"

    @property
    def broker(self) -> RedisUrl:
        """The URL of the queue's Redis."""
        return read_redis_url(self.broker_url)

    @property
    def backend(self) -> RedisUrl:
        """The URL of the results' Redis."""
        return read_redis_url(self.result_backend or self.broker_url)

    @property
    def copy_pace(self) -> CopyRate:
        """The copy rate of this host."""
        return CopyRate(self.runtime_dir or default_runtime_directory(), self.copy_rate)

    @property
    def limits(self) -> Limits:
        """The limits of inline forks and chunks."""
        return Limits(
            inline_files=self.inline_files,
            inline_bytes=self.inline_bytes,
            chunk_files=self.chunk_files,
            chunk_bytes=self.chunk_bytes,
            max_chunks=self.max_chunks,
        )


def read_settings(**given: str) -> Settings:
    """The settings. Keyword arguments override environment variables, and these override secret files.

    Raises BadSettings. For each unknown variable `FORKVM_*`, one warning a process is printed on stderr.
    """
    _warn(unknown_settings())
    settings = _parse(_secrets() | _environment() | given)
    _check(settings)
    return settings


def unknown_settings() -> list[str]:
    """A warning for each variable `FORKVM_*` that is not a setting."""
    return unknown_variables(os.environ, _VARIABLES)


def replaced_secrets() -> list[str]:
    """The variables that replace a secret file with another value. Raises BadSettings."""
    variables, files = _environment(), _secrets()
    return sorted(_variable(name) for name in variables.keys() & files.keys() if variables[name] != files[name])


def _variable(name: str) -> str:
    return f"{_PREFIX}{name.upper()}"


#: What reads each setting, by its name.
_READERS: dict[str, Callable[[str], object]] = {one.name: one.metadata["read"] for one in fields(Settings)}
#: The name of each setting, by that of its variable or secret file in lower case. The case of these does not matter.
_NAMES = {_variable(name).lower(): name for name in _READERS}
#: The variables of all settings.
_VARIABLES = frozenset((*map(_variable, _READERS), _SECRETS))


def _parse(texts: Mapping[str, str]) -> Settings:
    """The settings of texts by the settings' names. Raises BadSettings, which names all that are invalid."""
    values, errors = {}, []
    for name, read in _READERS.items():
        if name not in texts:
            continue
        try:
            values[name] = read(texts[name])
        except ValueError as error:
            errors.append(f"{_variable(name)}: {error}")
    if errors:
        raise BadSettings("; ".join(errors))
    return Settings(**values)  # type: ignore[arg-type]  # each reader returns the type of its field


def _environment() -> dict[str, str]:
    """The variables that are set and not empty, by the setting's name."""
    return {_NAMES[name.lower()]: text for name, text in os.environ.items() if text and name.lower() in _NAMES}


def _secrets() -> dict[str, str]:
    """The contents of the secret files, by the setting's name. Raises BadSettings."""
    directory = _secrets_directory()
    if directory is None:
        return {}
    try:
        texts, warnings = read_secret_files(directory, _NAMES)
    except (OSError, ValueError):  # the text of UnicodeDecodeError contains the secret
        raise BadSettings(f"{_SECRETS}: a file in it cannot be read, is too large, or is not UTF-8") from None
    _warn(warnings)
    return texts


def _secrets_directory() -> str | None:
    """The secrets directory, or None. Raises BadSettings if the named directory does not exist."""
    named = os.environ.get(_SECRETS)
    if named and not os.path.isdir(named):
        raise BadSettings(f"{_SECRETS}: {named} is not a directory")
    directory = named or _SECRETS_DIRECTORY
    return directory if os.path.isdir(directory) else None


def _warn(warnings: list[str]) -> None:
    for warning in new_warnings(warnings):
        print(f"forkvm: {ascii(warning)[1:-1]}", file=sys.stderr)


def _check(settings: Settings) -> None:
    """Check settings that depend on others or on files. Raises BadSettings."""
    if settings.redis_ca and not os.access(settings.redis_ca, os.R_OK):
        raise BadSettings(f"{_PREFIX}REDIS_CA: {settings.redis_ca} cannot be read")
    for variable, url in ((f"{_PREFIX}BROKER_URL", settings.broker), (f"{_PREFIX}RESULT_BACKEND", settings.backend)):
        if url.scheme == SENTINEL and not (url.master or settings.sentinel_master):
            remedy = "set FORKVM_SENTINEL_MASTER, or add ?master_name=NAME"
            raise BadSettings(f"{variable}: a sentinel:// URL needs the name of the master: {remedy}")
        for option, path in url.tls_files:
            if not os.access(path, os.R_OK):
                raise BadSettings(f"{variable}: {option}: the file cannot be read")
