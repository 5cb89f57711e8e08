"""The queues of a domain: the one that clients use, and those beside it."""

from __future__ import annotations

from tasks.context import (
    BATCH_TASK,
    BURY_TASK,
    CAMPAIGN_TASK,
    CHUNK_TASK,
    CONCLUDE_TASK,
    FINISH_TASK,
    FORK_TASK,
    SWEEP_TASK,
)

#: Queues beside the one that clients use: a finish must not wait behind chunks, nor a new fork behind either. What
#: this program sends again of a job goes past all that no worker has begun; a sweep goes behind all chunks.
_INNER_QUEUES = {
    CHUNK_TASK: "#chunk",
    BATCH_TASK: "#batch",
    FINISH_TASK: "#finish",
    CONCLUDE_TASK: "#finish",
    FORK_TASK: "#finish",
    CAMPAIGN_TASK: "#finish",
    BURY_TASK: "#finish",
    SWEEP_TASK: "#chunk",
}


def inner_queue(queue: str, task: str) -> str:
    """Where this program itself sends a task in the domain whose own queue is `queue`."""
    return queue + _INNER_QUEUES[task]


def inner_queues(queue: str) -> list[str]:
    """The queues that a worker of the domain queue `queue` consumes beside it."""
    return sorted({inner_queue(queue, task) for task in _INNER_QUEUES})
