"""The configuration of Flower for forkvm: `celery -A worker.app flower --conf=deploy/flower/flowerconfig.py`.

Flower knows a task by its events. They do not say that a job in parts ends as another task of the same id, how far it
is, and that it was cancelled. So tasks are shown here under names that say what they belong to, and the state of a job
that has not ended by its events is read from Redis.
"""

from celery import states
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


#: The tasks that have the id of a fork or campaign.
_JOBS = (FORK_TASK, FINISH_TASK, CAMPAIGN_TASK, FINISH_CAMPAIGN_TASK)


def format_task(task: Task) -> Task:
    """`task`, a copy of what Flower knows, as it is shown."""
    if task.name in _JOBS and task.state == states.STARTED:
        found = app.backend.get_task_meta(task.uuid, cache=False)
        if found["status"] != states.PENDING:  # PENDING means that Redis has no result of it
            task.state = found["status"]
        if task.state == "PROGRESS":
            done = found["result"]
            task.result = (
                f"{done['phase']}: {done['files_done']} of {done['files_total']} files, "
                f"{done['bytes_done']} of {done['bytes_total']} bytes"
            )
        elif task.state == states.REVOKED:
            task.exception = str(found["result"])
    task.name = _NAMES.get(task.name, task.name)
    return task


#: Its buttons would act on single tasks, not on whole jobs.
read_only = True
