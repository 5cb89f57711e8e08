"""What the machine must have for a test: without it the test is skipped on a laptop, and fails in CI."""

from __future__ import annotations

import os
import shutil
from typing import Literal, TypeVar

import pytest

T = TypeVar("T")

#: Where mkfs and mount are, also for a user whose PATH has no sbin; and docker's compose plugin.
_MORE_PATH = "/usr/local/sbin:/usr/sbin:/sbin:/usr/libexec/docker/cli-plugins:/usr/lib/docker/cli-plugins"


def in_ci() -> bool:
    return os.environ.get("CI", "").lower() in ("true", "1")


def require(found: T | Literal[False] | None, what: str, why: str) -> T:
    """Returns `found`; if that is False or None, skips the test, or in CI fails it.

    `what` names the missing thing and `why` what needs it, as in
    `require(os.geteuid() == 0, "root", "mounting filesystems")`.
    """
    if found is None or found is False:
        message = f"missing: {what}; needed for: {why}"
        if in_ci():
            pytest.fail(message, pytrace=False)
        pytest.skip(message)
    return found


def require_command(name: str, why: str) -> str:
    """Returns the path of the command `name`."""
    return require(shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:{_MORE_PATH}"), name, why)
