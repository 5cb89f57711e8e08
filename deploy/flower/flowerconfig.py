"""The configuration of Flower for forkvm: `celery -A worker.app flower --conf=deploy/flower/flowerconfig.py`.

Flower knows a task by its events. They do not say that a fork in chunks ends as another task of the same id, nor how
far it is. So its tasks are shown here under names that say what they belong to, with their progress.
"""

from celery.events.state import Task

from tasks.names import (
    ABANDON_TASK,
    BATCH_TASK,
    CAMPAIGN_TASK,
    CHUNK_TASK,
    FINISH_CAMPAIGN_TASK,
    FINISH_TASK,
    FORK_TASK,
    SWEEP_TASK,
)
from worker.app import app

#: What is shown for the tasks that no client sends.
_NAMES = {
    CHUNK_TASK: f"{FORK_TASK} (chunk)",
    FINISH_TASK: f"{FORK_TASK} (finish)",
    ABANDON_TASK: f"{FORK_TASK} (abandon)",
    BATCH_TASK: f"{CAMPAIGN_TASK} (batch)",
    FINISH_CAMPAIGN_TASK: f"{CAMPAIGN_TASK} (finish)",
    SWEEP_TASK: "(sweep)",
}


def format_task(task: Task) -> Task:
    """`task`, a copy of what Flower knows, as it is shown. For each fork that runs, its progress is read from Redis."""
    if task.name in (FORK_TASK, CAMPAIGN_TASK) and task.state == "STARTED":
        found = app.backend.get_task_meta(task.uuid, cache=False)
        if found["status"] == "PROGRESS":
            done = found["result"]
            task.state = "PROGRESS"
            task.result = (
                f"{done['phase']}: {done['files_done']} of {done['files_total']} files, "
                f"{done['bytes_done']} of {done['bytes_total']} bytes"
            )
    task.name = _NAMES.get(task.name, task.name)
    return task


read_only = True
