"""The settings. Each is an environment variable `FORKVM_*`, or a file of that name in the secrets directory."""

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
#: The variable that names the secrets directory. Its file `forkvm_broker_url`, for example, holds that setting.
_SECRETS = "FORKVM_SECRETS_DIR"
#: The default secrets directory, which docker and compose use.
_SECRETS_DIRECTORY = "/run/secrets"
#: The message of a worker that is started without roots.
NO_ROOTS = "no roots: set FORKVM_ROOTS to the directories that the worker may use, separated by colons"


class BadSettings(Exception):
    """A setting is invalid. The message names each invalid setting, and never contains a value that may be secret."""


class NoBroker(Exception):
    """Redis cannot be reached. The message names its address and the reason."""


def _paths(value: object) -> object:
    return tuple(os.path.normpath(path) for path in value.split(":") if path) if isinstance(value, str) else value


def _redis_url(value: str) -> str:
    if value:
        read_redis_url(value)
    return value


class Settings(BaseSettings):
    """All settings with their defaults. Sizes are in bytes, times in seconds."""

    model_config = SettingsConfigDict(env_prefix=_PREFIX, env_ignore_empty=True, extra="forbid", frozen=True)

    broker_url: Annotated[str, Field(min_length=1), AfterValidator(_redis_url)] = "redis://localhost:6379/0"
    #: Redis of the results; the broker's by default.
    result_backend: Annotated[str, AfterValidator(_redis_url)] = ""
    #: The password of Redis, for URLs without one. Meant for the secrets directory.
    redis_password: str = ""
    #: PEM file of the authorities that a `rediss://` server's certificate is verified with; the system's by default.
    redis_ca: str = ""
    #: The name of the master at the sentinels of a `sentinel://` URL.
    sentinel_master: str = ""
    #: The password of the sentinels, if they have one.
    sentinel_password: str = ""
    #: Directories in which a worker may fork, separated by colons. It accepts no paths outside of them.
    roots: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_paths)] = ()
    #: Name of the hosts that share a filesystem. The queue is named after it.
    domain: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]*$")] = ""
    #: TTL of everything that Redis holds about a fork.
    result_expires: Annotated[int, Field(ge=60)] = 86_400
    #: Time after which a dead worker's messages are redelivered. A live worker renews its messages every 2 s.
    visibility_timeout: Annotated[int, Field(ge=5)] = 10
    #: A process whose task takes longer is killed, and another process does the task again.
    task_time_limit: Annotated[int, Field(ge=1)] = 14_400
    #: Number of pool processes of a worker; by default the number of CPUs that it may use (`worker.cpus`).
    concurrency: Annotated[int | None, Field(ge=1)] = None
    #: The worker's name among Celery's nodes; see `worker.runtime.node_name`.
    name: Annotated[str, Field(max_length=64, pattern=r"^[A-Za-z0-9_.-]*$")] = ""
    #: See `tasks.copier.options.Limits`.
    inline_files: Annotated[int, Field(ge=0)] = Limits.inline_files
    inline_bytes: Annotated[int, Field(ge=0)] = Limits.inline_bytes
    chunk_files: Annotated[int, Field(ge=1)] = Limits.chunk_files
    chunk_bytes: Annotated[int, Field(ge=1 << 20)] = Limits.chunk_bytes
    max_chunks: Annotated[int, Field(ge=1, le=10_000)] = Limits.max_chunks
    #: File that a worker touches while it consumes, for a health check; empty for none.
    heartbeat_file: str = ""

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
    def limits(self) -> Limits:
        """The limits of inline forks and chunks."""
        return Limits(
            inline_files=self.inline_files,
            inline_bytes=self.inline_bytes,
            chunk_files=self.chunk_files,
            chunk_bytes=self.chunk_bytes,
            max_chunks=self.max_chunks,
        )


def read_settings(**given: Any) -> Settings:
    """The settings. Keyword arguments override environment variables, and these override secret files.

    Raises BadSettings. For each unknown variable `FORKVM_*`, one warning a process is printed on stderr.
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
    except (SettingsError, OSError, UnicodeDecodeError):  # the text of UnicodeDecodeError contains the secret
        raise BadSettings(f"{_SECRETS}: a file in it cannot be read, is too large, or is not UTF-8") from None
    _check(settings)
    return settings


def roots_of(settings: Settings) -> Roots:
    """The roots of the settings."""
    return Roots(settings.roots)


def _variable(name: str) -> str:
    return f"{_PREFIX}{name.upper()}"


#: The variables of all settings.
_VARIABLES = frozenset((*map(_variable, Settings.model_fields), _SECRETS))


def _secrets_directory() -> str | None:
    """The secrets directory, or None. Raises BadSettings if the named directory does not exist."""
    named = os.environ.get(_SECRETS)
    if named and not os.path.isdir(named):
        raise BadSettings(f"{_SECRETS}: {named} is not a directory")
    directory = named or _SECRETS_DIRECTORY
    return directory if os.path.isdir(directory) else None


def _check(settings: Settings) -> None:
    """Check settings that depend on others or on files. Raises BadSettings."""
    for root in settings.roots:
        if not root.startswith("/"):
            raise BadSettings(f"{_PREFIX}ROOTS: {root} is not an absolute path")
    if settings.redis_ca and not os.access(settings.redis_ca, os.R_OK):
        raise BadSettings(f"{_PREFIX}REDIS_CA: {settings.redis_ca} cannot be read")
    for variable, url in ((f"{_PREFIX}BROKER_URL", settings.broker), (f"{_PREFIX}RESULT_BACKEND", settings.backend)):
        if url.scheme == SENTINEL and not (url.master or settings.sentinel_master):
            remedy = "set FORKVM_SENTINEL_MASTER, or add ?master_name=NAME"
            raise BadSettings(f"{variable}: a sentinel:// URL needs the name of the master: {remedy}")
        for option, path in url.tls_files:
            if not os.access(path, os.R_OK):
                raise BadSettings(f"{variable}: {option}: the file cannot be read")
