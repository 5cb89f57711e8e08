"""The setting FORKVM_IO_PRIORITY: the I/O priority of the processes that clone.

The scheduler of the disk must know priorities (bfq, mq-deadline).
"""

from __future__ import annotations

from tasks.copier.kernel.processes import set_best_effort, set_idle


def use_io_priority(priority: str) -> None:
    """Set the I/O priority of this thread and of the processes that it starts.

    `priority` is `none` (leave it), `idle`, or `best-effort:0` (the highest) to `best-effort:7`. Raises OSError.
    """
    if priority == "idle":
        set_idle()
    elif priority != "none":
        set_best_effort(int(priority.partition(":")[2]))
