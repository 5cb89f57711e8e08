"""The final state of every job, and what is left."""

from __future__ import annotations

import os
import re
import shutil
import traceback
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from celery import states

from tasks.copier.fork_spec import ForkResult
from tasks.copier.report import FileResult
from tests.soak.jobs import Job
from tests.support.system.result_checks import check_file_results, check_fork_result
from tests.support.system.scheduler import Scheduler
from tests.support.tree import Entry, snapshot

#: The maximum number of open files, and of bytes of memory, of a worker's process, however long it runs.
MOST_FILES = 100
MOST_MEMORY = 200 << 20


@dataclass
class FinalChecks:
    """The first final result of each job, and the largest number of open files of any worker process."""

    scheduler: Scheduler
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    ends: Counter[str] = field(default_factory=Counter)
    #: The failed checks, one line per job.
    wrong: list[str] = field(default_factory=list)
    most_files: int = 0
    #: The open files, by kind, of the process that had the most.
    kinds_of_files: dict[str, int] = field(default_factory=dict)
    most_memory: int = 0
    _sources: dict[Path, dict[bytes, Entry]] = field(default_factory=dict)

    def close(self, job: Job) -> bool:
        """Check the result and the disk of a job, if it has ended. A successful fork is removed then."""
        if self.scheduler.results.states.get(job.fork_id)["status"] not in states.READY_STATES:
            return False
        result = self.scheduler.results.final.get(job.fork_id)
        forks = [self.scheduler.results.final.fork(fork_id) for fork_id in job.destinations]
        files = {fork_id: self.scheduler.files(fork_id) for fork_id in job.destinations}
        # All reads from Redis are done by now: if it fails before that, this method is called again.
        try:
            assert result is not None, "it ended without a result"
            assert None not in forks, "a fork of it ended without a ForkResult"
            self._check(job, result, cast(list[ForkResult], forks), files)
        except AssertionError as error:
            at = traceback.extract_tb(error.__traceback__)[-1]
            self.wrong.append(
                f"{job.fork_id} ({job.kind}): {str(error) or at.line} ({Path(at.filename).name}:{at.lineno})"
            )
        if job.plant is not None:
            job.plant.remove()
        self.results[job.fork_id] = result or {}
        return True

    def _check(
        self, job: Job, result: dict[str, Any], forks: list[ForkResult], files: dict[str, list[FileResult]]
    ) -> None:
        code = result["error"]["code"] if result["error"] is not None else None
        self.ends[code or "succeeded"] += 1
        assert code in job.ends, result["error"]
        for fork in forks:
            check_fork_result(fork)
            # Known gap: a part whose file is damaged between two attempts may be counted and have no FileResults.
            if not job.may_be_damaged:
                check_file_results(fork, files[fork["fork_id"]])
        if job.forks:
            ends: Counter[str] = Counter(fork["status"] for fork in forks)
            assert result["forks"] == {"total": job.forks, **{end: ends[end] for end in _STATES}}
            assert result["files"]["total"] == sum(fork["files"]["total"] for fork in forks)
        for fork in forks:
            self._close_fork(job, fork)

    def _close_fork(self, job: Job, result: ForkResult) -> None:
        destination = job.destinations[result["fork_id"]]
        error = result["error"]
        code = error["code"] if error is not None else None
        assert code in job.ends, f"{result['fork_id']}: {error}"
        # If the record of a published fork is damaged, the fork ends as failed although it exists: complete, or not at
        # all.
        is_there = code is None or (job.may_be_damaged and os.path.lexists(destination))
        if is_there:
            if job.source not in self._sources:
                self._sources[job.source] = snapshot(job.source)
            assert snapshot(destination) == self._sources[job.source], result["fork_id"]
            shutil.rmtree(destination)
        elif code == "destination_exists":
            destination.unlink()
        assert not os.path.lexists(destination), f"{result['fork_id']} failed and left its destination"

    def measure(self, pids: list[int]) -> None:
        """Record the open files and the memory of processes."""
        for pid in pids:
            try:
                files = open_files(pid)
                if len(files) > self.most_files:
                    self.most_files, self.kinds_of_files = len(files), dict(Counter(map(_kind_of_file, files)))
                pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
            self.most_memory = max(self.most_memory, pages * os.sysconf("SC_PAGE_SIZE"))

    def check_end(self, jobs: list[Job]) -> None:
        """No job has another result than its first one, and no late delivery made a fork again."""
        assert self.wrong == [], "\n".join(self.wrong)
        assert set(self.results) == {job.fork_id for job in jobs}
        changed = {
            job.fork_id: (self.results[job.fork_id], final)
            for job in jobs
            if (final := self.scheduler.results.final.get(job.fork_id)) != self.results[job.fork_id]
        }
        assert changed == {}, f"{len(changed)} results changed after their jobs had ended: {changed}"
        for job in jobs:
            status = self.scheduler.results.states.get(job.fork_id)["status"]
            assert status == _end(job, self.results[job.fork_id]), f"{job.fork_id} is {status}"
            for fork_id, destination in job.destinations.items():
                assert not os.path.lexists(destination), f"{fork_id} was made again"
        assert self.most_files <= MOST_FILES, f"a process had {self.most_files} open files: {self.kinds_of_files}"
        assert self.most_memory <= MOST_MEMORY, f"a process had {self.most_memory} bytes of memory"


def _end(job: Job, result: dict[str, Any]) -> str:
    """Celery's state of a job with this result: a campaign is also SUCCESS if only some of its forks succeeded."""
    has_result = job.forks and (result["error"] is None or result["status"] == "partial")
    return states.SUCCESS if has_result else _STATES[result["status"]]


_STATES = {"succeeded": states.SUCCESS, "failed": states.FAILURE, "cancelled": states.REVOKED}


def open_files(pid: int) -> list[str]:
    """The open files of a process, as named by the links in /proc. Raises OSError if it has ended."""
    found = []
    for name in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):  # closed in the meantime
            found.append(os.readlink(f"/proc/{pid}/fd/{name}"))
    return found


def _kind_of_file(link: str) -> str:
    """`socket`, `pipe`, `anon_inode`, or the end of a path without its digits."""
    if not link.startswith("/"):
        return link.partition(":")[0]
    return re.sub(r"[0-9a-f]{8,}|\d+", "N", "/".join(link.split("/")[-2:]))
