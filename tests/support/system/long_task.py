"""A task for tests that takes a given time. A worker loads it by the argument `include` of `start_worker`."""

from __future__ import annotations

import time

from worker.app import app

NAME = "tests.long_task"


@app.task(name=NAME)
def long_task(seconds: float) -> str:
    time.sleep(seconds)
    return "done"
