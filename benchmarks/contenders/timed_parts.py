"""Times parts of a worker where they run: between its forks, with the caches as these leave them.

In a loop of their own, the same parts take a fifth of the time.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any

from tasks import context
from worker.observability.reports import Pipe, Report, Reporter

#: The environment variable with the path of the file that the processes of a worker append their times to.
VARIABLE = "BENCHMARK_PARTS"
#: A pool process reports a fork; the main process counts a report; a pool process writes the line of a fork in the log.
REPORT, COUNT, LINE = "report", "count", "line"


def time_parts(path: str) -> None:
    """Time the parts in this process and in those that it forks."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def note(part: str, nanoseconds: int, number: int) -> None:
        os.write(fd, f"{part} {nanoseconds} {number}\n".encode())

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            began = time.thread_time_ns()
            try:
                return function(*args, **kwargs)
            finally:
                note(part, time.thread_time_ns() - began, 1)

        return run

    reporter: Any = Reporter
    reporter.forks_ended = timed(REPORT, reporter.forks_ended)
    module: Any = context
    module.log_end = timed(LINE, module.log_end)
    pipe: Any = Pipe
    read, ended_at = pipe.read, 0

    def read_and_note(self: Pipe) -> Iterator[Report]:
        # From the end of one turn to the end of the next: all that the thread of the reports does.
        nonlocal ended_at
        number = 0
        for report in read(self):
            number += report[0] == "forks"
            yield report
        note(COUNT, time.thread_time_ns() - ended_at, number)
        ended_at = time.thread_time_ns()

    pipe.read = read_and_note


def read_parts(path: Path) -> dict[str, float]:
    """Seconds of each part for one fork, on average, since the last call."""
    if not path.exists():
        return {}
    spent: defaultdict[str, float] = defaultdict(float)
    numbers: defaultdict[str, int] = defaultdict(int)
    for line in path.read_text().splitlines():
        part, nanoseconds, number = line.split()
        spent[part] += int(nanoseconds) / 1e9
        numbers[part] += int(number)
    os.truncate(path, 0)
    return {part: spent[part] / numbers[part] for part in spent}
