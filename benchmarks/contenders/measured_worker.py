"""The worker that is measured: a forkvm worker with one more task, which does nothing."""

from __future__ import annotations

from benchmarks.contenders.service import EMPTY_TASK
from worker.app import app
from worker.cli import main


def empty() -> None:
    """Do nothing: the time of this task is what Celery itself takes."""


if __name__ == "__main__":
    app.task(name=EMPTY_TASK)(empty)
    main()
