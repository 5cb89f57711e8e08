"""The settings: one environment variable `FORKVM_*` each, or a file of that name in a directory of secrets."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict, SettingsError

from tasks.copier.options import Limits
from tasks.copier.roots import Roots
from worker.environment import new_warnings, unknown_variables
from worker.redis_url import SENTINEL, RedisUrl, read_redis_url

_PREFIX = "FORKVM_"
#: Names the directory in which each file `forkvm_broker_url` and so on holds the setting of that name.
_SECRETS = "FORKVM_SECRETS_DIR"
#: Where docker and compose put secrets.
_SECRETS_DIRECTORY = "/run/secrets"
#: Why a worker does not start.
NO_ROOTS = "no roots: set FORKVM_ROOTS to the directories that may be served, separated by colons"


class BadSettings(Exception):
    """Settings that cannot be meant; the message names each and never holds a value that may be secret."""


class NoBroker(Exception):
    """Redis cannot be reached; the message says which and why."""


def _paths(value: object) -> object:
    return tuple(os.path.normpath(path) for path in value.split(":") if path) if isinstance(value, str) else value


def _redis_url(value: str) -> str:
    if value:
        read_redis_url(value)
    return value


class Settings(BaseSettings):
    """Every setting, with its default. Sizes are bytes, times are seconds."""

    model_config = SettingsConfigDict(env_prefix=_PREFIX, env_ignore_empty=True, extra="forbid", frozen=True)

    broker_url: Annotated[str, Field(min_length=1), AfterValidator(_redis_url)] = "redis://localhost:6379/0"
    #: Where results are kept; the broker's Redis unless it is set.
    result_backend: Annotated[str, AfterValidator(_redis_url)] = ""
    #: The password of Redis, for URLs that have none; meant for a file of secrets.
    redis_password: str = ""
    #: A file of the authorities (PEM) that a `rediss://` server's certificate is verified by; the system's unless set.
    redis_ca: str = ""
    #: The name under which the sentinels of a `sentinel://` URL know the master.
    sentinel_master: str = ""
    #: The password of the sentinels themselves, where they have one.
    sentinel_password: str = ""
    #: Directories that a worker serves requests within, separated by colons.
    roots: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_paths)] = ()
    #: The hosts that see one filesystem; names the queue.
    domain: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]*$")] = ""
    #: TTL of everything that is kept of a fork.
    result_expires: Annotated[int, Field(ge=60)] = 86_400
    #: After so long the messages of a dead worker are delivered again; a live one renews this every 2 s.
    visibility_timeout: Annotated[int, Field(ge=5)] = 10
    #: A process that works on one task for so long is killed, and the task done again by another.
    task_time_limit: Annotated[int, Field(ge=1)] = 14_400
    #: Pool processes of a worker; as many as it may use CPUs (`worker.cpus`) unless it is set.
    concurrency: Annotated[int | None, Field(ge=1)] = None
    #: A worker's name among Celery's nodes; see `worker.runtime.node_name`.
    name: Annotated[str, Field(max_length=64, pattern=r"^[A-Za-z0-9_.-]*$")] = ""
    #: See `tasks.copier.options.Limits`.
    inline_files: Annotated[int, Field(ge=0)] = Limits.inline_files
    inline_bytes: Annotated[int, Field(ge=0)] = Limits.inline_bytes
    chunk_files: Annotated[int, Field(ge=1)] = Limits.chunk_files
    chunk_bytes: Annotated[int, Field(ge=1 << 20)] = Limits.chunk_bytes
    max_chunks: Annotated[int, Field(ge=1, le=10_000)] = Limits.max_chunks
    #: A file that a worker touches while it consumes, for a health check.
    heartbeat_file: str = ""

    @property
    def queue(self) -> str:
        """The queue of the domain."""
        return f"forkvm.{self.domain}" if self.domain else "forkvm"

    @property
    def broker(self) -> RedisUrl:
        """The Redis of the queue."""
        return read_redis_url(self.broker_url)

    @property
    def backend(self) -> RedisUrl:
        """The Redis of the results."""
        return read_redis_url(self.result_backend or self.broker_url)

    @property
    def limits(self) -> Limits:
        """The sizes of the work."""
        return Limits(
            inline_files=self.inline_files,
            inline_bytes=self.inline_bytes,
            chunk_files=self.chunk_files,
            chunk_bytes=self.chunk_bytes,
            max_chunks=self.max_chunks,
        )


def read_settings(**given: Any) -> Settings:
    """The settings: those `given` by name first, then variables that are not empty, then secret files.

    Raises BadSettings. A variable `FORKVM_*` that is no setting is warned of on stderr, once a process.
    """
    for warning in new_warnings(unknown_variables(os.environ, _VARIABLES)):
        print(f"forkvm: {ascii(warning)[1:-1]}", file=sys.stderr)
    try:
        settings = Settings(_secrets_dir=_secrets_directory(), **given)
    except ValidationError as error:
        clauses = [
            f"{_variable('.'.join(map(str, detail['loc'])))}: {detail['msg'].removeprefix('Value error, ')}"
            for detail in error.errors(include_url=False, include_context=False, include_input=False)
        ]
        raise BadSettings("; ".join(clauses)) from None
    except (SettingsError, OSError, UnicodeDecodeError):  # the text of the last repeats the secret
        raise BadSettings(f"{_SECRETS}: a secret file cannot be read, is too large, or is not UTF-8") from None
    _check(settings)
    return settings


def roots_of(settings: Settings) -> Roots:
    """The roots as the engine takes them."""
    return Roots(settings.roots)


def _variable(name: str) -> str:
    return f"{_PREFIX}{name.upper()}"


#: Every variable that means something to the program.
_VARIABLES = frozenset((*map(_variable, Settings.model_fields), _SECRETS))


def _secrets_directory() -> str | None:
    """The directory of secrets. Raises BadSettings where one is named and is none."""
    named = os.environ.get(_SECRETS)
    if named and not os.path.isdir(named):
        raise BadSettings(f"{_SECRETS}: {named} is no directory")
    directory = named or _SECRETS_DIRECTORY
    return directory if os.path.isdir(directory) else None


def _check(settings: Settings) -> None:
    """What no setting shows alone. Raises BadSettings."""
    for root in settings.roots:
        if not root.startswith("/"):
            raise BadSettings(f"{_PREFIX}ROOTS: {root} is not an absolute path")
    if settings.redis_ca and not os.access(settings.redis_ca, os.R_OK):
        raise BadSettings(f"{_PREFIX}REDIS_CA: {settings.redis_ca} cannot be read")
    for variable, url in ((f"{_PREFIX}BROKER_URL", settings.broker), (f"{_PREFIX}RESULT_BACKEND", settings.backend)):
        if url.scheme == SENTINEL and not (url.master or settings.sentinel_master):
            remedy = "set FORKVM_SENTINEL_MASTER, or write ?master_name=NAME"
            raise BadSettings(f"{variable}: sentinel:// needs the name of the master: {remedy}")
        for option, path in url.tls_files:
            if not os.access(path, os.R_OK):
                raise BadSettings(f"{variable}: {option}: the file cannot be read")
