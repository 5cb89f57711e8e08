"""A client with Celery and without forkvm, as a program for a container: `python - COMMAND ARGUMENTS`.

Each command prints one JSON document.
"""

from __future__ import annotations

import json
import sys
import time
import urllib.request
from typing import Any

from celery import Celery  # type: ignore[import-untyped, unused-ignore]

app = Celery(broker="redis://redis:6379/0", backend="redis://redis:6379/0")


def send(task: str, request: str, job_id: str, queue: str) -> Any:
    """Send a job without waiting for it."""
    return app.send_task(task, kwargs={"request": json.loads(request)}, task_id=job_id, queue=queue).id


def get(job_id: str, seconds: str) -> Any:
    """The result of a job, as `AsyncResult.get` returns or raises it."""
    result = app.AsyncResult(job_id)
    try:
        return {"result": result.get(timeout=float(seconds)), "state": result.state}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "state": result.state}


def progress(job_id: str, share: str) -> Any:
    """The progress of a job when `share` of its bytes are done, or its state if it ended before that."""
    while True:
        found = app.backend.get_task_meta(job_id, cache=False)
        if found["status"] in ("SUCCESS", "FAILURE", "REVOKED"):
            return {"state": found["status"]}
        if found["status"] == "PROGRESS":
            info = found["result"]
            if info["bytes_total"] and info["bytes_done"] >= float(share) * info["bytes_total"]:
                return {"state": "PROGRESS"} | info
        time.sleep(0.05)


def pools() -> Any:
    """The pool size of each worker that replies, by node name."""
    deadline = time.monotonic() + 30
    while not (answers := app.control.inspect(timeout=2).stats()) and time.monotonic() < deadline:
        pass
    return {name: stats["pool"]["max-concurrency"] for name, stats in (answers or {}).items()}


def fetch(url: str) -> Any:
    """The JSON at a URL; null if there is none."""
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)
    except (OSError, ValueError):
        return None


if __name__ == "__main__":
    commands: dict[str, Any] = {"send": send, "get": get, "progress": progress, "pools": pools, "fetch": fetch}
    print(json.dumps(commands[sys.argv[1]](*sys.argv[2:])))
