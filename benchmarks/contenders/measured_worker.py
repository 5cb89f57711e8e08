"""The worker that is measured: a forkvm worker with one more task, which does nothing, and whose parts can be timed."""

from __future__ import annotations

import os

from benchmarks.contenders.service import EMPTY_TASK
from benchmarks.contenders.timed_parts import VARIABLE, time_parts
from worker.app import app
from worker.cli import main


def empty() -> None:
    """Do nothing: the time of this task is what Celery itself takes."""


if __name__ == "__main__":
    app.task(name=EMPTY_TASK)(empty)
    if VARIABLE in os.environ:
        time_parts(os.environ[VARIABLE])
    main()
