"""The log line for refused reflinks: one for each pair of filesystems, since a full copy of each fork may follow."""

from __future__ import annotations

import logging

from tasks.copier.errors import errno_name
from tasks.names import job_fields
from worker.observability.reports import Report

log = logging.getLogger(__name__)


class FallbackLog:
    """Logs the first refused reflink of each pair of filesystems in this worker."""

    def __init__(self) -> None:
        self._logged: set[tuple[str, str]] = set()

    def take(self, report: Report) -> None:
        """Take a report of one of the worker's processes."""
        if report[0] != "fallback":
            return
        _, number, source, destination, _, fork_id, task, task_id = report
        if (source, destination) not in self._logged:
            self._logged.add((source, destination))
            log.warning(
                "files are copied, not reflinked, from %s to %s: the kernel refused (%s); `forkvm doctor` checks the "
                "roots; further cases are not logged",
                *(source, destination, errno_name(number)),
                extra=job_fields(task, task_id) | {"fork_id": fork_id},
            )
