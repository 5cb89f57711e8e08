"""Tasks for tests that take long. A worker loads them by the argument `include` of `start_worker`."""

from __future__ import annotations

import time
from pathlib import Path

from worker.app import app


@app.task(name="tests.long_task")
def long_task(seconds: float) -> str:
    time.sleep(seconds)
    return "done"


@app.task(name="tests.awaiting_task")
def awaiting_task(path: str) -> str:
    """Wait until `path` exists."""
    while not Path(path).exists():
        time.sleep(0.05)
    return "done"
