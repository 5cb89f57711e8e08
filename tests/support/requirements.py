"""Requirements of a test on the machine: if one is missing, the test is skipped on a laptop and fails in CI."""

from __future__ import annotations

import os
import shutil
from typing import Literal, TypeVar

import pytest

T = TypeVar("T")

#: The directories of mkfs and mount, also for a user whose PATH has no sbin; and that of docker's compose plugin.
_MORE_PATH = "/usr/local/sbin:/usr/sbin:/sbin:/usr/libexec/docker/cli-plugins:/usr/lib/docker/cli-plugins"


def in_ci() -> bool:
    return os.environ.get("CI", "").lower() in ("true", "1")


def require(found: T | Literal[False] | None, what: str, why: str) -> T:
    """Return `found`; if it is False or None, skip the test, or fail it in CI.

    `what` names the missing requirement and `why` what needs it, as in `require(os.geteuid() == 0, "root", "mounting
    filesystems")`.
    """
    if found is None or found is False:
        message = f"missing: {what}; needed for: {why}"
        if in_ci():
            pytest.fail(message, pytrace=False)
        pytest.skip(message)
    return found


def require_command(name: str, why: str) -> str:
    """The path of the command `name`."""
    return require(shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:{_MORE_PATH}"), name, why)
