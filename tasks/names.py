"""The names of the tasks and queues. They are part of the wire format: workers of two versions share a queue."""

from __future__ import annotations

FORK_TASK = "forkvm.fork"
CHUNK_TASK = "forkvm.chunk"
FINISH_TASK = "forkvm.finish"
BATCH_TASK = "forkvm.batch"
CAMPAIGN_TASK = "forkvm.campaign"
FINISH_CAMPAIGN_TASK = "forkvm.conclude"
ABANDON_TASK = "forkvm.bury"
SWEEP_TASK = "forkvm.sweep"

#: Queues beside the one that clients use: a finish must not wait behind chunks, nor a new fork behind either. A job
#: that this program sends again passes all jobs that no worker has begun. A sweep waits behind all chunks.
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


def inner_queue(queue: str, task: str) -> str:
    """The queue to which this program sends a task within the domain whose own queue is `queue`."""
    return queue + _INNER_QUEUES[task]


def domain_of(queue: str) -> str:
    """The domain's own queue, for that queue or for one of its inner queues."""
    return queue.partition("#")[0]


def inner_queues(queue: str) -> list[str]:
    """The queues that a worker of the domain queue `queue` consumes beside it."""
    return sorted({inner_queue(queue, task) for task in _INNER_QUEUES})
