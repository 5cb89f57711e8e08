"""A task of the tests' own that takes as long as it is told: `celery worker -I tests.support.system.long_task`."""

from __future__ import annotations

import time

from worker.app import app

NAME = "tests.long_task"


@app.task(name=NAME)
def long_task(seconds: float) -> str:
    time.sleep(seconds)
    return "done"
