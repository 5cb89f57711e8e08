"""The settings, from the environment: one `FORKVM_*` variable each."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from tasks.copier.kernel.roots import Roots
from tasks.copier.options import Limits

_PREFIX = "FORKVM_"
#: Why a worker does not start.
NO_ROOTS = "no roots: set FORKVM_ROOTS to the directories that may be served, separated by colons"


class BadSettings(Exception):
    """The environment holds settings that cannot be meant; the message names each."""


class NoBroker(Exception):
    """Redis cannot be reached; the message says which and why."""


def _paths(value: object) -> object:
    return tuple(os.path.normpath(path) for path in value.split(":") if path) if isinstance(value, str) else value


class Settings(BaseModel):
    """Every setting, with its default. Sizes are bytes, times are seconds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    broker_url: str = "redis://localhost:6379/0"
    #: Where results are kept; the broker's Redis unless it is set.
    result_backend: str = ""
    #: A file of the authorities (PEM) that a `rediss://` server's certificate is verified by; the system's unless set.
    redis_ca: str = ""
    #: Directories that a worker serves requests within, separated by colons.
    roots: Annotated[tuple[str, ...], BeforeValidator(_paths)] = ()
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
    #: A worker's name among Celery's nodes; see `worker.node_name`.
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
    def limits(self) -> Limits:
        """The sizes of the work."""
        return Limits(
            inline_files=self.inline_files,
            inline_bytes=self.inline_bytes,
            chunk_files=self.chunk_files,
            chunk_bytes=self.chunk_bytes,
            max_chunks=self.max_chunks,
        )


def read_settings(environment: Mapping[str, str] | None = None) -> Settings:
    """The settings in the environment; an empty variable counts as unset. Raises BadSettings."""
    variables = os.environ if environment is None else environment
    given = {
        name.removeprefix(_PREFIX).lower(): value
        for name, value in variables.items()
        if name.startswith(_PREFIX) and value
    }
    try:
        settings = Settings.model_validate(given)
    except ValidationError as error:
        clauses = [
            f"{_PREFIX}{'.'.join(map(str, detail['loc'])).upper()}: {detail['msg']}"
            for detail in error.errors(include_url=False, include_context=False, include_input=False)
        ]
        raise BadSettings("; ".join(clauses)) from None
    for root in settings.roots:
        if not root.startswith("/"):
            raise BadSettings(f"{_PREFIX}ROOTS: {root} is not an absolute path")
    if settings.redis_ca and not os.access(settings.redis_ca, os.R_OK):
        raise BadSettings(f"{_PREFIX}REDIS_CA: {settings.redis_ca} cannot be read")
    return settings


def roots_of(settings: Settings) -> Roots:
    """The roots as the engine takes them."""
    return Roots(settings.roots)
