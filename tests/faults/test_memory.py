"""A worker whose processes have little memory makes a fork of many files."""

from __future__ import annotations

import resource
from pathlib import Path

from tests.fixtures.filesystems import Fresh
from tests.fixtures.processes import StartWorker
from tests.support.system.scheduler import Scheduler

FILES, DIRECTORIES = 20_000, 20
#: The address space that a process may add to that of an idle one, in bytes.
_MORE_BYTES = 96 << 20


def test_a_large_fork_is_made_by_processes_with_little_memory(
    own_scheduler: Scheduler,
    start_worker: StartWorker,
    mounts: Path,
    fresh: Fresh,
) -> None:
    directory = fresh("xfs")
    for number in range(DIRECTORIES):
        layer = directory / "source" / f"layer-{number}"
        layer.mkdir(parents=True)
        for n in range(FILES // DIRECTORIES):
            (layer / f"block-{n}").touch()
    worker = start_worker(mounts, 2)
    for pid in worker.children:
        size = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
        limit = size + _MORE_BYTES
        resource.prlimit(pid, resource.RLIMIT_AS, (limit, limit))
    children = worker.children

    result = own_scheduler.fork(directory / "source", directory / "fork")

    assert result["status"] == "succeeded"
    assert result["files"]["reflinked"] == FILES
    assert result["chunks"] > 1
    assert worker.children == children, "one ran out of memory and was replaced"
    own_scheduler.wait_quiet()
