"""The obvious alternative to forkvm: a Celery task that runs cp in a subprocess."""

from __future__ import annotations

import os
import subprocess

from celery import Celery

app = Celery("ten_lines", broker=os.environ["TEN_LINES_URL"], backend=os.environ["TEN_LINES_URL"])
app.conf.update(task_acks_late=True, worker_prefetch_multiplier=1, task_default_queue="ten_lines")


@app.task(name="ten_lines.fork")
def fork(request: dict[str, str]) -> None:
    """Fork a directory."""
    subprocess.run(["cp", "-a", "--reflink=always", request["source"], request["destination"]], check=True)
