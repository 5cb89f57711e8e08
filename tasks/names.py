"""The names of the tasks and queues.

They are part of the wire format: workers of two versions share a queue. So some are older than the names in the code.
"""

from __future__ import annotations

import re

FORK_TASK = "forkvm.fork"
ESTIMATE_TASK = "forkvm.estimate"
CHUNK_TASK = "forkvm.chunk"
FINISH_TASK = "forkvm.finish"
BATCH_TASK = "forkvm.batch"
CAMPAIGN_TASK = "forkvm.campaign"
FINISH_CAMPAIGN_TASK = "forkvm.conclude"
ABANDON_TASK = "forkvm.bury"
SWEEP_TASK = "forkvm.sweep"

#: The tasks that clients send, each with the one argument `request`.
CLIENT_TASKS = (FORK_TASK, CAMPAIGN_TASK, ESTIMATE_TASK)

#: The suffix of the inner queue in which this program itself sends each task. Clients use the queue without a suffix.
#: A finish must not wait behind chunks, and a new fork behind neither. A fork or campaign that is sent again overtakes
#: all that have not started. A sweep follows all chunks: see `tasks.sweep`.
_INNER_QUEUES = {
    CHUNK_TASK: "#chunk",
    BATCH_TASK: "#batch",
    FINISH_TASK: "#finish",
    FINISH_CAMPAIGN_TASK: "#finish",
    FORK_TASK: "#finish",
    CAMPAIGN_TASK: "#finish",
    ABANDON_TASK: "#finish",
    SWEEP_TASK: "#chunk",
}

#: The queue of a domain, without the suffix of an inner queue.
DOMAIN_QUEUE = re.compile(r"forkvm(\.[A-Za-z0-9_.-]+)?")
#: The id of a chunk's or batch's message; the group is the id of the fork or campaign.
PART_ID = re.compile(r"(.+)\.(?:chunk|batch)\.[0-9]+", re.DOTALL)
#: The kind of the job that each task is a part of, as the log names its id.
_JOBS = {
    **dict.fromkeys((FORK_TASK, CHUNK_TASK, FINISH_TASK, ABANDON_TASK), "fork_id"),
    **dict.fromkeys((CAMPAIGN_TASK, BATCH_TASK, FINISH_CAMPAIGN_TASK), "campaign_id"),
}


def job_fields(task: str, task_id: str) -> dict[str, str]:
    """The fields of a log line about a task: `task_id`, and `fork_id` or `campaign_id` if it is a part of a job."""
    if task not in _JOBS:
        return {"task_id": task_id}
    part = PART_ID.fullmatch(task_id) if task in (CHUNK_TASK, BATCH_TASK) else None
    return {"task_id": task_id, _JOBS[task]: part[1] if part else task_id}


def is_part_of_job(task: str) -> bool:
    """Whether a message of this task is a part of a fork or campaign. Estimates and sweeps are not."""
    return task in _JOBS


def inner_queue(queue: str, task: str) -> str:
    """The queue in which this program itself sends `task`, in the domain whose clients use `queue`."""
    return queue + _INNER_QUEUES[task]


def domain_of(queue: str) -> str:
    """The domain's own queue, for that queue or for one of its inner queues."""
    return queue.partition("#")[0]


def inner_queues(queue: str) -> list[str]:
    """The inner queues of the domain whose clients use `queue`: its workers consume these too."""
    return sorted({inner_queue(queue, task) for task in _INNER_QUEUES})
